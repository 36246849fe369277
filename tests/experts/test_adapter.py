"""An adapter's kind, files and modules, told from its folder."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest

from odd_files import one_line_of, rewrite
from paths import GOLDENS
from phatgoose.errors import ExpertError
from phatgoose.experts.expert import LAYOUT, Expert, adapter_files, read_modules
from phatgoose.experts.peft_files import ADAPTER_CONFIG
from phatgoose.files import sha256_of

SHAPES = [
    [0, 2**62],
    [2**62, 0],
    [0, 2**63],
    [2**32, 2**32, 0],
    [],
    [0],
    [1],
    [0, 0],
    [1, 0],
    [0, 1],
]
SHAPES += [[1, 1, 1], [2, 1, 1], [2, 3], [3, 0, 2**61], [0, -1], [2**64, 0]]


def reshaped(file: Path, shape: list[int]) -> None:
    """Give every tensor of a safetensors file `shape`, and as much data as that needs."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    size = max(0, 4 * math.prod(shape))
    names = [name for name in json.loads(content[8 : 8 + length]) if name != "__metadata__"]
    table = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size * len(names))


@pytest.mark.parametrize("kind", ["expert", "ia3", "bottleneck"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_of_odd_shapes_are_one_line(tmp_path, kind, shape):
    folder = shutil.copytree(GOLDENS / kind, tmp_path / kind)
    file = adapter_files(folder).weights
    reshaped(folder / file, shape)
    rewrite(folder / LAYOUT.info, adapter_sha256=sha256_of(folder / file))
    assert kind in one_line_of(lambda: Expert.load(folder), ExpertError)
    one_line_of(lambda: Expert.from_peft(folder, {}), ExpertError)


def test_a_directory_of_two_adapters_is_refused(tmp_path):
    folder = shutil.copytree(GOLDENS / "bottleneck", tmp_path / "adapter")
    (folder / ADAPTER_CONFIG).write_text("{}")
    told = one_line_of(lambda: read_modules(folder), ExpertError)
    assert "files of two adapters" in told
    assert str(folder) in told
