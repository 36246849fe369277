"""`phatgoose pool`, `compose`, `generate` and `evaluate`."""

from __future__ import annotations

import json
import re

import pytest

from command_line import (
    BASE,
    refused,
    write_rows,
)
from planted import ATTACKS, attacked, honest


@pytest.mark.parametrize("model", ["experts", "tiny-base", "experts/reviews"])
def test_evaluate_takes_a_pool_or_a_base_or_one_expert(here, phat, model):
    options = ["--k", 1] if model == "experts/reviews" else []
    outcome = phat("evaluate", model, "--task", "counting.jsonl", "--limit", 3, *options)
    assert (outcome.code, outcome.err) == (0, "")
    assert "exact match" in outcome.out


def test_generate_shows_the_experts_behind_the_tokens(here, phat):
    outcome = phat("generate", "experts", "Film", "--show-experts", "--max-new-tokens", 3, *BASE)
    assert outcome.code == 0
    assert "reviews" in outcome.out or "counting" in outcome.out


def test_sampling_with_one_seed_gives_one_answer(here, phat):
    sample = ["generate", "experts", "Film", "--sample", "--max-new-tokens", 12, *BASE]
    answers = [phat(*sample, "--seed", seed).out for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_experts_are_kept_and_left_out_by_name(here, phat):
    outcome = phat("compose", "experts", "--out", "a", "--keep", "reviews", "--k", 1, *BASE)
    assert outcome.out.startswith("1 expert at")
    outcome = phat("compose", "experts", "--out", "b", "--leave-out", "reviews", "--k", 1, *BASE)
    assert outcome.out.startswith("1 expert at")
    kept = [json.loads((here / name / "routed.json").read_text())["experts"] for name in "ab"]
    assert [row["name"] for rows in kept for row in rows] == ["reviews", "counting"]


def test_a_k_above_the_pool_is_lowered_with_a_warning_of_one_line(here, phat):
    outcome = phat("compose", "experts", "--out", "routed", "--k", 9, *BASE)
    assert outcome.code == 0
    assert re.fullmatch(r"warning: k is 9, but the pool has 2 experts[^\n]*\n", outcome.err)
    assert phat("generate", "routed", "Film", "--max-new-tokens", 2, *BASE).code == 0


def test_a_router_is_chosen_for_pools_alone(here, phat):
    assert phat("compose", "experts", "--out", "routed", *BASE).code == 0
    for place in ("routed", "tiny-base"):
        for command in (
            ["generate", place, "Film"],
            ["evaluate", place, "--task", "reviews.jsonl"],
            ["explain", place, "Film"],
            ["analyse", place, "--task", "reviews.jsonl"],
            ["export", place, "--out", "x"],
        ):
            outcome = phat(*command, "--router", "arrow", *BASE)
            assert outcome.code == 2
            assert "not" in outcome.err
            assert f"{place} is" in outcome.err


def test_templates_serve_rows_of_any_fields(here, phat):
    write_rows(here / "raw.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(6)])
    outcome = phat(
        "evaluate", "experts", "--task", "raw.jsonl", *BASE,
        "--template", "{{ text }} is ||| {{ answer_choices[label] }}", "--choices", "good ||| bad",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "rank classification" in outcome.out


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["generate", "experts", "Film", "--temperature", 2], "--temperature is for --sample"),
        (["generate", "experts", "Film", "--seed", 0], "--seed is for --sample"),
        (["export", "experts", "--out", "x", "--limit", 9], "--limit is for --task"),
        (["export", "experts", "--out", "x", "--template", "a ||| b"], "--template is for --task"),
        (["analyse", "experts", "--suite", "t0ho", "--choices", "a"], "--choices is for --task"),
        (
            ["explain", "experts", "Film", "--answer", "", "--max-new-tokens", 4],
            "leave it out with --answer",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_an_option_that_would_do_nothing_is_refused(here, phat, command, complaint):
    outcome = phat(*command)
    assert outcome.code == 2
    assert complaint in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["generate", "experts", "caf\udce9"], r"The prompt holds '\udce9', which is no character"),
        (["export", "experts", "--out", "x", "--prompt", "\udce9"], r"The prompt holds '\udce9'"),
        (["generate", "experts", "Film", "--sample", "--seed", 1 << 70], "from 0 to 4294967295"),
        (["generate", "experts", "Film", "--sample", "--seed", -1], "from 0 to 4294967295"),
    ],
    ids=lambda value: ascii(" ".join(map(str, value))) if isinstance(value, list) else "",
)
def test_bytes_that_are_no_text_and_seeds_of_no_kind_are_refused(here, phat, command, complaint):
    refused(phat(*command, *BASE), complaint)


def test_settings_that_the_router_ignores_are_told_in_one_line(here, phat):
    ignored = ["--router", "merged", "--k", 1, *BASE]
    for command in (
        ["compose", "experts", "--out", "routed"],
        ["generate", "experts", "Film", "--max-new-tokens", 1],
        ["export", "experts", "--out", "merged"],
    ):
        outcome = phat(*command, *ignored)
        assert outcome.code == 0
        assert outcome.err == "warning: Router merged doesn't use --k.\n"
    taken = [
        "generate",
        "experts",
        "Film",
        "--max-new-tokens",
        1,
        "--k",
        1,
        "--router",
        "arrow:temperature=2",
    ]
    assert phat(*taken, *BASE).err == ""


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "experts", "--task", "reviews.jsonl"],
        ["explain", "experts", "Film"],
        ["train", "reviews.jsonl", "--out", "new", "--plan", "--measure"],
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(here, phat, monkeypatch, command):
    for work in ("apps.cli.options.ModelOptions.open", "training.plan.plan_training"):
        monkeypatch.setattr(f"phatgoose.{work}", lambda *_, **__: pytest.fail("worked"))
    outcome = phat(*command, "--base", "tiny-base", "--json", "reviews.jsonl/x.json")
    assert outcome.code == 2
    assert "reviews.jsonl/x.json can't be written" in outcome.err


@pytest.fixture
def crowd(pool_of, tmp_path, monkeypatch):
    """Eight experts in a folder of the current one, e2 with its own means for gates."""
    monkeypatch.chdir(tmp_path)
    pool = honest(pool_of("llama", (4,) * 8))
    for expert in attacked(pool, 2, ATTACKS["gate equal to own mean"], 0, 1).experts:
        expert.save(tmp_path / "crowd" / expert.name)
    return tmp_path


def test_audit_names_who_looks_unlike_the_others_and_exits_with_1(crowd, phat):
    outcome = phat("audit", "crowd", "--no-neutral", "--json", "audit.json")
    assert outcome.code == 1, outcome.err
    assert "*" in outcome.out
    assert "e2: its gates have a cosine of 1.00 with its own mean activations" in outcome.out
    assert "--leave-out e2" in outcome.out
    assert "note: Neutral text was not read" in outcome.out
    written = json.loads((crowd / "audit.json").read_text())
    assert {name for finding in written["findings"] for name in finding["experts"]} == {"e2"}
    clean = phat("audit", *sorted((crowd / "crowd").glob("e[!2]")), "--no-neutral")
    assert (clean.code, clean.err) == (0, "")
    assert "nothing found" in clean.out


def test_audit_reads_neutral_text_with_the_base(here, phat):
    outcome = phat("audit", "experts", *BASE)
    assert outcome.code == 0, outcome.err
    assert "too few to compare" in outcome.out
    assert "effect" in outcome.out
    assert "Neutral text was not read" not in outcome.out


def test_compose_warns_of_experts_that_look_unlike_the_others(crowd, phat):
    outcome = phat("compose", "crowd", "--out", "routed")
    assert outcome.code == 0
    (line,) = outcome.err.splitlines()
    assert line.startswith("warning: 1 of 8 experts don't look like the others: e2.")
    assert "phatgoose audit" in line
