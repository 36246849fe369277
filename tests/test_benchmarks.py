"""The benchmarks in their smoke sizes: every row is measured, told and written down."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from safetensors import safe_open
from transformers import LlamaConfig

from command_line import Outcome
from paths import ROOT

pytest.importorskip("lm_eval", reason="needs the extra 'harness'")

RUN = ROOT / "benchmarks" / "run.py"
ROWS = {
    "prefill": 4,
    "choosing": 5,
    "linear": 4,
    "decoding": 2,
    "reference": 1,
    "arrow": 4,
    "ranking": 2,
    "comparison": 1,
    "together": 2,
    "reading": 4,
    "training": 1,
    "gates": 1,
    "growth": 3,
}
FLOORLESS = ("memory", "packed", "loop", "choice", "prompts of")


def run_program(script: Path, *arguments: object) -> int:
    """The exit status of `script`; what it sets for its whole process is undone afterwards."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        patch.syspath_prepend(str(script.parent))
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(script), run_name="__main__")
    return int(caught.value.code or 0)


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., Outcome]:
    """`run(*arguments)`: what the program prints and answers.

    Memory is measured in forks of this process; for numbers that count, they begin afresh.
    """
    monkeypatch.syspath_prepend(str(RUN.parent))
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr("measuring._forkserver", lambda: fork)

    def program(*arguments: object) -> Outcome:
        code = run_program(RUN, "--threads", 1, *arguments)
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    return program


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_every_row_is_measured_told_and_written_down(run, tmp_path):
    # One test, not five on a shared run: each of xdist's workers would do that run anew.
    done = run("--smoke", "--rounds", 1, "--pools", tmp_path / "pools", "--out", tmp_path)
    assert done.code == 0, done.err
    (written,) = tmp_path.glob("*-smoke.json")
    rows = json.loads(written.read_text(encoding="utf-8"))
    assert {name: len(row["findings"]) for name, row in rows.items()} == ROWS
    for name, row in rows.items():
        check_row(name, row)
    check_table(done.out, rows)
    check_that_prompts_are_computed_once(rows["ranking"])
    (figure,) = tmp_path.glob("*-growth.png")
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_another_type_has_its_own_pool_and_file(run, tmp_path):
    places = ("--pools", tmp_path / "pools", "--out", tmp_path)
    done = run("--smoke", "--rows", "linear,decoding", "--dtype", "float32", *places)
    assert done.code == 0, done.err
    assert "float32; commit" in done.out
    (written,) = tmp_path.glob("*-float32-smoke.json")
    rows = json.loads(written.read_text(encoding="utf-8"))
    assert {row["dtype"] for row in rows.values()} == {"float32"}
    (expert, *_) = (tmp_path / "pools" / "tiny-float32").rglob("*.safetensors")
    with safe_open(expert, "pt") as file:
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.float32


def check_row(name: str, row: dict) -> None:
    assert {"commit", "cpu", "cores", "date", "torch", "peft"} <= row.keys()
    assert row["threads"] == 1
    for finding in row["findings"]:
        assert math.isfinite(finding["measured"]), finding
        # A tiny model's memory is noise around 0, and growth may be 0.
        noise = name == "growth" or any(w in finding["case"] for w in ("memory", "goes on with"))
        assert noise or finding["measured"] > 0, finding
        floorless = any(word in finding["case"] for word in FLOORLESS)
        assert floorless or finding["floor"] is not None, finding


def check_table(printed: str, rows: dict[str, dict]) -> None:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + sum(ROWS.values())
    cases = [finding["case"] for row in rows.values() for finding in row["findings"]]
    assert all(any(case in line for line in lines) for case in cases)
    assert "mean nothing" in printed


def check_that_prompts_are_computed_once(ranking: dict) -> None:
    details = ranking["findings"][0]["details"]
    assert details["computed"] < details["hflm"]


def test_the_arithmetic_floors_are_those_of_the_issue(monkeypatch):
    monkeypatch.syspath_prepend(str(RUN.parent))
    from floors import Work
    from phatgoose.base.loading import load_skeleton

    smollm2 = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    work = Work.of(load_skeleton(smollm2), rank=16)
    floors = [1 + work.routed(experts, k=2) / work.base() for experts in (36, 166)]
    assert floors == pytest.approx([1.14, 1.32], abs=0.01)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_the_arrow_model_made_quickly_is_pefts_own(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RUN.parent))
    from against_arrow import arrow_of_peft
    from bench import SMOKE, Bench, twin

    bench = Bench(SMOKE, tmp_path)
    paths = bench.experts(3)
    quick = arrow_of_peft(twin(bench.base).model, paths, k=2)
    own = create_arrow_model(
        twin(bench.base).model,
        [str(path) for path in paths],
        ArrowConfig(top_k=2, rng_seed=0),
        autocast_adapter_dtype=False,
    ).eval()
    batch = bench.prompts(2, 8)
    with torch.inference_mode():
        got, wanted, base = (model(**batch).logits for model in (quick, own, bench.base.model))
    assert torch.equal(got, wanted)
    assert not torch.equal(wanted, base)
    assert quick.state_dict().keys() == own.state_dict().keys()


def test_an_unknown_row_is_refused_by_name(run):
    done = run("--rows", "prefill,nothing")
    assert done.code == 2
    assert "no row 'nothing'; there are prefill" in done.err
