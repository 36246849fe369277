"""`phatgoose serve`: what is refused before anything listens."""

from __future__ import annotations

import pytest

from command_line import refused


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--replicas", 2], "--replicas is for --engine ray"),
        (["--router", "nothing"], "nothing"),
        (["--dtype", "float33"], "float33"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(phat, llama_pool, flags, complaint):
    pytest.importorskip("fastapi", reason="needs phatgoose[serve]")
    refused(phat("serve", llama_pool.experts[0].directory.parent, *flags), complaint)


@pytest.mark.parametrize("query", ["?router=merged&k=4", ""])
def test_settings_that_a_router_ignores_are_told(phat, llama_pool, query):
    pytest.importorskip("fastapi", reason="needs phatgoose[serve]")
    place = f"goose={llama_pool.experts[0].directory.parent}{query}"
    flags = [] if query else ["--router", "merged", "--k", 4]
    outcome = phat("serve", place, *flags, "--dtype", "float33")
    assert outcome.err.splitlines()[0] == "warning: Router merged doesn't use --k."
