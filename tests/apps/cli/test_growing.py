"""The commands on pools that grow: compose, add, remove, pool --duplicates."""

import json
import shutil
from pathlib import Path

import pytest

from phatgoose.experts.expert import LAYOUT
from phatgoose.routing.saved import read_saved
from tiny import write_expert


@pytest.fixture
def folder(loaded_bases, tmp_path, monkeypatch) -> Path:
    """Experts e0 to e3 and a copy of the first, under another name."""
    for z in range(4):
        write_expert(loaded_bases["llama"], tmp_path, f"e{z}", seed=z)
    copy = shutil.copytree(tmp_path / "experts" / "e0", tmp_path / "experts" / "copy")
    info = json.loads((copy / LAYOUT.info).read_text()) | {"name": "copy"}
    (copy / LAYOUT.info).write_text(json.dumps(info))
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


def test_a_pool_tells_its_near_duplicates(phat, folder):
    done = phat("pool", "experts", "--duplicates", "0.9")
    assert done.code == 0
    assert "1 pairs with a cosine of 0.9 or more" in done.out
    line = next(line for line in done.out.splitlines() if "identical" in line)
    assert line.replace("│", " ").split() == ["copy", "e0", "1.0000", "identical"]
