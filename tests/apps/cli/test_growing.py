"""The commands on pools that grow: compose, add, remove."""

from pathlib import Path

import pytest

from phatgoose.routing.saved import read_saved
from tiny import write_expert


@pytest.fixture
def folder(loaded_bases, tmp_path, monkeypatch) -> Path:
    """Experts e0 to e3."""
    for z in range(4):
        write_expert(loaded_bases["llama"], tmp_path, f"e{z}", seed=z)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_routed_models_folder_is_changed_by_commands(phat, folder):
    done = phat("compose", "experts/e0", "experts/e1", "--out", "routed")
    assert (done.code, done.err) == (0, "")
    assert "2 experts at 14 sites, router discriminant, k = 1 -> routed" in done.out
    done = phat("add", "routed", "experts/e2", "experts/e3")
    assert (done.code, done.out) == (0, "4 experts at 14 sites -> routed\n")
    done = phat("remove", "routed", "e1")
    assert (done.code, done.out) == (0, "3 experts at 14 sites -> routed\n")
    assert read_saved(folder / "routed").names == ("e0", "e2", "e3")
    assert phat("generate", "routed", "Hello", "--max-new-tokens", "2").code == 0
