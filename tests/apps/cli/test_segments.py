"""The commands on packed models: compose --stored, add, remove, compact, pool --duplicates."""

import json
import shutil
from pathlib import Path

import pytest

from growth_cases import write_small_experts
from phatgoose.experts.expert import LAYOUT
from phatgoose.routing.saved.tensors import read_saved


@pytest.fixture
def folder(loaded_bases, tmp_path, monkeypatch) -> Path:
    """Experts x0000 to x0003 and a copy of the first, under another name."""
    write_small_experts(loaded_bases["llama"], tmp_path / "experts", 4, rank=2)
    copy = shutil.copytree(tmp_path / "experts" / "x0000", tmp_path / "experts" / "copy")
    info = json.loads((copy / LAYOUT.info).read_text()) | {"name": "copy"}
    (copy / LAYOUT.info).write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_routed_models_folder_is_changed_by_commands(phat, folder):
    done = phat("compose", "experts/x0000", "experts/x0001", "--out", "routed", "--stored", "int8")
    assert (done.code, done.err) == (0, "")
    assert "2 experts at 14 sites, router phatgoose, k = 2 -> routed" in done.out
    done = phat("add", "routed", "experts/x0002", "experts/x0003")
    assert (done.code, done.out) == (0, "4 experts at 14 sites in 2 files -> routed\n")
    done = phat("remove", "routed", "x0001")
    assert (done.code, done.out) == (0, "3 experts at 14 sites in 2 files -> routed\n")
    done = phat("compact", "routed", "--stored", "bfloat16")
    assert (done.code, done.out) == (0, "3 experts at 14 sites in 1 file -> routed\n")
    assert read_saved(folder / "routed").names == ("x0000", "x0002", "x0003")
    assert phat("generate", "routed", "Hello", "--max-new-tokens", "2").code == 0


def test_a_pool_tells_its_near_duplicates(phat, folder):
    done = phat("pool", "experts", "--duplicates", "0.9")
    assert done.code == 0
    assert "1 pairs with a cosine of 0.9 or more" in done.out
    line = next(line for line in done.out.splitlines() if "identical" in line)
    assert line.replace("│", " ").split() == ["copy", "x0000", "1.0000", "identical"]
