"""Mapped safetensors files: the library's own numbers, read strictly, given back on request."""

import json
import os
import re
import struct
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from odd_files import one_line_of
from phatgoose.errors import ExpertError
from phatgoose.files import AT_ONCE, FEW, MOST_JSON_BYTES, TYPES, TensorFile, prefetch

STATUS = Path("/proc/self/status")

shapes = st.lists(st.integers(0, 5), max_size=3)
tensors = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.tuples(st.sampled_from(sorted(TYPES)), shapes, st.integers(0, 2**30)),
    max_size=6,
)


def random_tensor(kind: str, shape: list[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, shape, generator=generator).to(getattr(torch, TYPES[kind]))


def write_raw(path: Path, table: str, data: bytes) -> Path:
    """A file of just this header and data."""
    path.write_bytes(struct.pack("<Q", len(table)) + table.encode() + data)
    return path


def resident() -> int:
    """Bytes of mapped files that are in this process's memory."""
    return 1024 * int(re.search(r"RssFile:\s*(\d+)", STATUS.read_text())[1])


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(tensors)
def test_every_tensor_is_the_librarys(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    save_file({name: random_tensor(*how) for name, how in wanted.items()}, path)
    file, theirs = TensorFile(path), load_file(path)
    file.check_finite()
    assert set(file) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(file[name], tensor, rtol=0, atol=0)
    assert file.sha256() == sha256(path.read_bytes()).hexdigest()


def header(shape: list[int], end: int, dtype: str = "F32", name: str = "a", begin: int = 0) -> str:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}})


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (header([1], 8), "is not valid"),
        (header([1], 8, begin=4), "is not valid"),
        (header([8], 8, "F8_E5M2"), "'F8_E5M2'"),
        (header([8], 8, "U8", "\n"), r"tensor '\n'"),
        (header([8], 8, "U8")[:-1] + ", " + header([8], 8, "U8")[1:], "twice"),
        ("[]", "is not valid"),
        ("{" + " " * MOST_JSON_BYTES, f"its header has {MOST_JSON_BYTES + 1} bytes"),
        (header([2, *[1] * 100_000], 8), "is of 'F32'"),  # whose strides would take days
        *((header(empty, 0), "is not valid") for empty in ([0, 2**62], [3, 0, 2**50], [2**63, 0])),
    ],
    ids=range(11),
)
def test_a_header_that_lies_is_refused_in_one_line(tmp_path, table, complaint):
    data = b"" if "[0, 0]" in table else bytes(8)
    path = write_raw(tmp_path / "a.safetensors", table, data)
    assert complaint in one_line_of(lambda: TensorFile(path), ExpertError)


def test_a_header_of_any_length_will_do(tmp_path):
    numbers = torch.arange(6, dtype=torch.float32).view(2, 3)
    for pad in range(4):
        table = header([2, 3], 24) + " " * pad
        path = write_raw(tmp_path / "a.safetensors", table, numbers.numpy().tobytes())
        assert torch.equal(TensorFile(path)["a"], numbers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tensor_that_is_not_finite_is_named(tmp_path, value, dtype):
    tensors = {name: torch.ones(FEW + 3, dtype=dtype) for name in ("a", "b", "c")}
    tensors["b"][-1] = value
    tensors["whole"] = torch.arange(3)
    tensors["large"] = torch.full((100,), 3e38)  # finite, though their sum isn't
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ExpertError, match="tensor b is not"):
        TensorFile(tmp_path / "a.safetensors").check_finite()


def test_an_empty_tensor_at_the_end_hides_no_other(tmp_path):
    every = {"w": ([2], 0, 8), "z": ([0], 0, 0), "last": ([0], 8, 8)}
    parts = [header(shape, end, "F32", name, begin) for name, (shape, begin, end) in every.items()]
    table = "{" + ", ".join(part[1:-1] for part in parts) + "}"
    file = TensorFile(
        write_raw(tmp_path / "a", table, torch.full((2,), torch.nan).numpy().tobytes())
    )
    with pytest.raises(ExpertError, match="tensor w is not finite"):
        file.check_finite()


@pytest.mark.skipif(not STATUS.is_file(), reason="memory is told by Linux's /proc")
def test_what_was_read_is_given_back_and_can_be_read_again(tmp_path):
    numbers = torch.arange(2 * AT_ONCE // 4, dtype=torch.float32)
    save_file({"a": numbers}, tmp_path / "a.safetensors")
    file, before = TensorFile(tmp_path / "a.safetensors"), resident()
    assert torch.equal(file["a"], numbers)
    assert resident() - before > 0.9 * numbers.nbytes
    file.release()
    assert resident() - before < 0.1 * numbers.nbytes
    file.check_finite()
    file.sha256()
    assert resident() - before < 0.6 * numbers.nbytes  # checks keep to pieces
    save_file({"a": torch.zeros(3)}, tmp_path / "other")
    os.replace(tmp_path / "other", tmp_path / "a.safetensors")
    file.release()
    assert torch.equal(file["a"], numbers)  # still those of the file that was opened


def test_results_come_in_the_order_of_their_items_and_few_ahead(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert list(prefetch(lambda number: number * number, range(9))) == [n * n for n in range(9)]
    begun = []
    results = prefetch(begun.append, range(100))
    next(results)
    time.sleep(0.1)
    assert len(begun) <= 3
    assert len(list(results)) == 99
    failing = prefetch(lambda number: 1 // number, [1, 0, 1])
    assert next(failing) == 1
    with pytest.raises(ZeroDivisionError):
        next(failing)
