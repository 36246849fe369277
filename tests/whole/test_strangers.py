"""Experts of strangers: whatever is done to a directory, what comes back is an expert or one line.

So is whatever is done with it: checked, imported, printed and saved. PHATGOOSE_FUZZ sets how many
damaged directories are tried (research/reliability.md has figures).
"""

import io
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from damage import (
    FILES,
    JSON_FILES,
    TENSOR_FILES,
    damaged,
    damages,
    examples,
    only_reading,
    record_hashes,
    told,
)
from paths import GOLDENS
from phatgoose.apps.cli import main
from phatgoose.errors import ExpertError, PhatgooseError, PoolError
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.experts.importing import import_adapter
from phatgoose.experts.pool import Pool

KINDS = ("expert", "ia3", "bottleneck", "dora")  # one golden directory of each
MOST_SECONDS = 5  # of the processor, for a directory of a few kilobytes


def command(*words: object) -> None:
    """The command, which must print what can't steer a terminal and end with 0, 1 or 2."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code in (0, 1, 2)
    assert not set("\x1b\r\x07\x08\u202e") & set(out.getvalue())
    assert "Traceback" not in out.getvalue()


@examples(120)
@given(
    done=damages(JSON_FILES, TENSOR_FILES, (LAYOUT.card,)),
    rehash=st.booleans(),
    kind=st.sampled_from(KINDS),
    seldom=st.integers(0, 5),
)
def test_a_damaged_directory_is_an_expert_or_one_line(done, rehash, kind, seldom):
    Expert.load(GOLDENS / kind)  # whatever is imported late is imported now
    with damaged(GOLDENS / kind, done) as folder:
        if rehash:
            record_hashes(folder)
        expert, begun = None, time.process_time()
        with only_reading(folder), told():
            expert = Expert.load(folder)
        assert time.process_time() - begun < MOST_SECONDS
        if expert is None:
            with pytest.raises(PhatgooseError):
                Pool.open(folder)
        else:
            assert_is_an_expert(expert, folder.parent.with_name("again"))
        if seldom < 5:  # the rest takes long
            return
        command("check", folder)
        command("pool", folder.parent)
        bare = folder.parent.with_name("bare")  # the adapter alone is imported
        bare.mkdir()
        for file in (*JSON_FILES[1:], *TENSOR_FILES[:2]):
            if (folder / file).is_file():
                with suppress(OSError):
                    shutil.copyfile(folder / file, bare / file, follow_symlinks=False)
        with told():
            mine = bare.with_name("mine")
            assert import_adapter(bare, mine, base_id="you/base", allow_loss=0.5).modules


def assert_is_an_expert(expert: Expert, place: Path) -> None:
    """What `expert` says holds, and it survives being written and read."""
    Expert.load(expert.directory)
    for site, module in expert.modules.items():
        tensors = [part for part in vars(module).values() if isinstance(part, torch.Tensor)]
        held = [vectors[site] for vectors in (expert.gates, expert.means) if vectors]
        assert all(torch.isfinite(part).all() for part in (*tensors, *held))
        assert all(part.numel() > 0 for part in tensors)
    again = expert.save(place)
    assert again.info.name == expert.info.name
    assert again.modules.keys() == expert.modules.keys()
    assert again.gates.keys() == expert.gates.keys()
    assert all(torch.equal(again.gates[site], expert.gates[site]) for site in expert.gates)


def link(path: Path) -> None:
    (path.parent.parent / path.name).write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        (kind, file)
        for kind in ("expert", "bottleneck")
        for file in FILES[:-1]
        if (GOLDENS / kind / file).exists()
    ],
)
def test_what_is_no_file_of_the_directory_is_not_read(tmp_path, kind, file):
    directory = shutil.copytree(GOLDENS / kind, tmp_path / "golden")
    link(directory / file)
    with pytest.raises(ExpertError, match="it is a link that leads out"):
        Expert.load(directory)


def test_a_pool_does_not_leave_its_folder(golden_copy, tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "link").symlink_to(golden_copy)
    with pytest.raises(PoolError, match="leads out of"):
        Pool.open(tmp_path / "pool")
    assert Pool.open(tmp_path / "pool" / "link").names == ("golden",)
