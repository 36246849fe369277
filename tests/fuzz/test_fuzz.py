"""The fuzz targets: each passes on its corpus, and half a minute finds no fault.

`make fuzz` runs them for longer (CONTRIBUTING.md).
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

import readers
import schemas
from phatgoose.apps import grammars
from phatgoose.apps.server.local import json_form
from tiny import make_tokenizer

INPUTS = [(t, path) for t in readers.TARGETS for path in sorted((readers.CORPUS / t).iterdir())]


@pytest.mark.parametrize(
    ("target", "path"), INPUTS, ids=[f"{target}-{path.name}" for target, path in INPUTS]
)
def test_a_reader_passes_on_its_corpus_and_accepts_what_it_should(target, path):
    refusal = readers.TARGETS[target](path.read_bytes())
    assert (path.name == "unprintable") == bool(refusal)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("words", "runs"),
    [(("readers.py", "all", "22"), len(readers.TARGETS)), (("kernel.py", "8"), 1)],
)
def test_half_a_minute_of_fuzzing_finds_nothing(words, runs, tmp_path):
    program, *arguments = words
    command = [sys.executable, Path(__file__).with_name(program), *arguments, tmp_path / "corpus"]
    (tmp_path / "corpus").mkdir()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    for missing in ("No module named 'atheris'", "no clang++ that has libFuzzer"):
        if missing in done.stderr:
            pytest.skip(missing)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    assert len(counts) == runs
    assert all(int(line.split()[-1]) > 5 for line in counts)


needs_library = pytest.mark.skipif(json_form.LLMatcher is None, reason="needs phatgoose[json]")


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
def test_strange_schemas_are_compiled_within_limits_or_refused():
    limits = json_form.Limits(seconds=0.3)
    runner = schemas.runner_of(make_tokenizer(final_eos=False))
    assert {schemas.tried(seed, runner, limits) for seed in range(12)} >= {"refused", "compiled"}


@needs_library
def test_a_pattern_of_many_states_ends_an_answer_and_not_the_memory(monkeypatch):
    """`.*a.{200}b.*` has 2 ** 200 states, which come as an answer is written."""
    monkeypatch.setitem(grammars.LIMITS, "max_lexer_states", 500)
    grammar = schemas.grammar_of({"type": "string", "pattern": ".*a.{200}b.*"})
    assert json_form.proven(grammar, 60, json_form.Limits()).why == ""
    runner = schemas.runner_of(make_tokenizer(final_eos=False))
    assert "too many states" in schemas.walked(grammar, runner, random.Random(0), steps=2000)
