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
from phatgoose.errors import ExpertError, RoutingError

SECONDS_OF_READERS, SECONDS_OF_KERNEL = 22, 8
HERE = Path(__file__).parent
INPUTS = [(t, path) for t in readers.TARGETS for path in sorted((readers.CORPUS / t).iterdir())]

# A target, what it reads with, and what this must not do.
FAULTS = [
    ("strict_json", "read_json", lambda *_: {"a": 1}),
    ("tensor_file", "TensorFile", ValueError("not ours")),
    ("expert_info", "read_info", ExpertError("\x1b[2J")),
    ("expert", "check_expert", lambda *_: ["a problem"]),
    ("description", "read_description", RoutingError("x" * 2000)),
    ("saved", "read_saved", RoutingError("")),
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
def test_a_reader_passes_on_its_corpus(target, path):
    readers.TARGETS[target](path.read_bytes())


def test_the_corpus_has_an_input_of_every_target_that_is_accepted(monkeypatch):
    refusals = []
    monkeypatch.setattr(readers, "_refused", lambda error, **_: refusals.append(error))
    for target, path in INPUTS:
        refusals.clear()
        readers.TARGETS[target](path.read_bytes())
        assert (path.name in {"unprintable"}) == bool(refusals), (
            target,
            path.name,
        )


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


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory) -> Path:
    program = kernel.built(tmp_path_factory.mktemp("kernel"))
    if program is None:
        pytest.skip(f"needs a compiler: {kernel.MISSING}")
    return program


@pytest.mark.heavy
def test_fuzzing_the_kernel_finds_nothing(fuzzer, tmp_path):
    seconds = f"-max_total_time={SECONDS_OF_KERNEL}"
    done = kernel.run(
        fuzzer,
        *(str(tmp_path), str(kernel.CORPUS), seconds, *kernel.LIMITS),
        f"-artifact_prefix={tmp_path}/",
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("while (count > 1 && has_one_token_twice(q, count, k)) count /= 2;", ""),
        ("std::vector<float> affinity(E);", "std::vector<float> affinity(E - 1);"),
    ],
)
def test_the_kernel_target_notices_a_fault(before, after, tmp_path, monkeypatch):
    own = tmp_path / "src" / "phatgoose" / "routing" / "kernels" / "native.cpp"
    own.parent.mkdir(parents=True)
    source = (HERE.parents[1] / own.relative_to(tmp_path)).read_text(encoding="utf-8")
    assert before in source
    own.write_text(source.replace(before, after), encoding="utf-8")
    target = tmp_path / "tests" / "fuzz" / "kernel.cpp"
    target.parent.mkdir(parents=True)
    target.write_bytes(kernel.SOURCE.read_bytes())
    monkeypatch.setattr(kernel, "SOURCE", target)
    program = kernel.built(tmp_path)
    if program is None:
        pytest.skip(f"needs a compiler: {kernel.MISSING}")
    found = tmp_path / "corpus"  # the first folder is written to
    found.mkdir()
    done = kernel.run(
        program,
        *(str(found), str(kernel.CORPUS), "-runs=2000", "-max_len=512"),
        f"-artifact_prefix={tmp_path}/",
    )
    assert done.returncode != 0
