"""The fuzz targets: each passes on its corpus, notices a fault, and half a minute finds none.

`make fuzz` runs them for longer (CONTRIBUTING.md).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import kernel
import readers
from phatgoose.errors import RoutingError

SECONDS_OF_READERS, SECONDS_OF_KERNEL = 22, 8
HERE = Path(__file__).parent
INPUTS = [(t, path) for t in readers.TARGETS for path in sorted((readers.CORPUS / t).iterdir())]

# A target, what it reads with, and what this must not do.
FAULTS = [
    ("strict_json", "read_json", lambda *_: {"a": 1}),
    ("tensor_file", "TensorFile", ValueError("not ours")),
    ("expert", "check_expert", lambda *_: ["a problem"]),
    ("saved", "read_saved", RoutingError("x" * 2000)),
    ("patterns", "matching", lambda *_: ["everything"]),
    ("completion", "parsed", lambda *_: None),
    ("chat", "parsed", KeyError("not ours")),
]


def run_corpus(target: str) -> None:
    for path in sorted((readers.CORPUS / target).iterdir()):
        readers.TARGETS[target](path.read_bytes())


@pytest.fixture(autouse=True)
def _own_place(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_place", lambda: tmp_path)


@pytest.mark.parametrize(
    ("target", "path"), INPUTS, ids=[f"{target}-{path.name}" for target, path in INPUTS]
)
def test_a_reader_passes_on_its_corpus_and_accepts_what_it_should(target, path, monkeypatch):
    refusals, refused = [], readers._refused
    monkeypatch.setattr(readers, "_refused", lambda error: refusals.append(refused(error)))
    readers.TARGETS[target](path.read_bytes())
    assert (path.name == "unprintable") == bool(refusals)


@pytest.mark.parametrize(("target", "reader", "fault"), FAULTS, ids=lambda x: str(x)[:20])
def test_a_target_notices_a_fault(target, reader, fault, monkeypatch):
    def faulty(*given: object, **_: object) -> object:
        if isinstance(fault, Exception):
            raise fault
        return fault(*given)

    monkeypatch.setattr(readers, reader, faulty)
    with pytest.raises((readers.FaultError, ValueError, AttributeError, KeyError)):
        run_corpus(target)


def test_every_target_has_a_corpus_and_a_fault():
    folders = {path.name for path in readers.CORPUS.iterdir()}
    assert folders == {*readers.TARGETS, "kernel"}
    assert {target for target, *_ in FAULTS} == set(readers.TARGETS)


@pytest.mark.heavy
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="needs Atheris (pip install 'phatgoose[fuzz]'; Linux on x86-64)",
)
def test_half_a_minute_of_fuzzing_the_readers_finds_nothing(tmp_path):
    command = [sys.executable, str(HERE / "readers.py"), "all", str(SECONDS_OF_READERS)]
    done = subprocess.run(
        [*command, str(tmp_path / "corpus")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    assert len(counts) == len(readers.TARGETS)
    assert all(int(line.split()[-1]) > 5 for line in counts)


@pytest.mark.heavy
def test_fuzzing_the_kernel_finds_nothing(tmp_path_factory, tmp_path):
    program = kernel.built(tmp_path_factory.mktemp("kernel"))
    if program is None:
        pytest.skip(f"needs a compiler: {kernel.MISSING}")
    seconds = f"-max_total_time={SECONDS_OF_KERNEL}"
    done = kernel.run(
        program,
        *(str(tmp_path), str(kernel.CORPUS), seconds, *kernel.LIMITS),
        f"-artifact_prefix={tmp_path}/",
    )
    assert done.returncode == 0, done.stderr[-3000:]
