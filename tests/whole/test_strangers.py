"""Experts of strangers: whatever is done to a directory, what comes back is an expert or one line.

So is whatever is done with it: checked, imported, printed and saved. PHATGOOSE_FUZZ sets how many
damaged directories are tried (research/reliability.md has figures).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damage import (
    FILES,
    JSON_FILES,
    TENSOR_FILES,
    damages,
    do_all,
    record_hashes,
    unexpected,
    watched,
)
from paths import GOLDEN, GOLDENS
from phatgoose.apps.cli import main
from phatgoose.errors import ExpertError, PhatgooseError, PoolError
from phatgoose.experts.expert import LAYOUT, Expert, check_expert
from phatgoose.experts.importing import import_adapter
from phatgoose.experts.pool import Pool

KINDS = ("expert", "ia3", "bottleneck", "dora")  # one golden directory of each
EXAMPLES = int(os.environ.get("PHATGOOSE_FUZZ", "120"))
MOST_SECONDS = 5  # of the processor, for a directory of a few kilobytes
SECRET = "the secret of somebody else"

DAMAGES = damages(JSON_FILES, TENSOR_FILES, (LAYOUT.card,))


def one_line_or(action: Callable[[], object]) -> None:
    """Do `action`, which must succeed or end in one line."""
    try:
        action()
    except PhatgooseError as error:
        told = str(error)
        assert "\n" not in told
        assert len(told) < 2500


def command(*words: object) -> None:
    """The command, which must print what can't steer a terminal and end with 0 or 2."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code in (0, 1, 2)
    told = out.getvalue() + err.getvalue()
    assert not set("\x1b\r\x07\x08\u202e") & set(told)
    assert "Traceback" not in told


@settings(
    max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(DAMAGES, st.booleans(), st.sampled_from(KINDS), st.integers(0, 5))
def test_a_damaged_directory_is_an_expert_or_one_line(done, rehash, kind, seldom):
    Expert.load(GOLDENS / kind)  # whatever is imported late is imported now
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "experts" / "golden"
        shutil.copytree(GOLDENS / kind, folder)
        (folder.parent / "secret.json").write_text(json.dumps({"name": SECRET}))
        do_all(done, folder)
        if rehash:
            record_hashes(folder)
        before = sorted(path.name for path in folder.parent.rglob("*"))
        begun = time.process_time()
        with watched() as events:
            try:
                expert: Expert | None = Expert.load(folder)
            except ExpertError as error:
                expert, message = None, str(error)
        assert unexpected(events, folder) == []
        assert time.process_time() - begun < MOST_SECONDS
        assert sorted(path.name for path in folder.parent.rglob("*")) == before
        if expert is None:
            assert message.isprintable()
            assert len(message) < 1500
            assert SECRET not in message
            assert check_expert(folder)
            with pytest.raises(PhatgooseError):
                Pool.open(folder)
        else:
            assert_is_an_expert(expert, Path(place) / "again")
        if seldom:  # the rest takes long
            return
        command("check", folder)
        command("pool", folder.parent)
        bare, mine = Path(place) / "bare", Path(place) / "mine"  # the adapter alone is imported
        bare.mkdir()
        for file in (*JSON_FILES[1:], *TENSOR_FILES[:2]):
            if (folder / file).is_file():
                with suppress(OSError):
                    shutil.copyfile(folder / file, bare / file, follow_symlinks=False)
        one_line_or(lambda: import_adapter(bare, mine, base_id="you/base", allow_loss=0.5))
        if mine.exists():
            assert Expert.load(mine).modules
        assert SECRET in (folder.parent / "secret.json").read_text()


def assert_is_an_expert(expert: Expert, place: Path) -> None:
    """What `expert` says holds, and it survives being written and read."""
    assert check_expert(expert.directory) == []
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


@pytest.fixture
def kind() -> str:
    """The golden directory to take."""
    return "expert"


@pytest.fixture
def directory(tmp_path, kind) -> Path:
    """An expert directory of one's own, with something secret beside it."""
    (tmp_path / "secret.json").write_text((GOLDEN / LAYOUT.info).read_text())
    return shutil.copytree(GOLDENS / kind, tmp_path / "golden")


each_file = pytest.mark.parametrize(
    ("kind", "file"),
    [
        (kind, file)
        for kind in ("expert", "bottleneck")
        for file in FILES[:-1]
        if (GOLDENS / kind / file).exists()
    ],
)


def complaint(directory: Path) -> str:
    with pytest.raises(ExpertError) as caught:
        Expert.load(directory)
    return str(caught.value)


@each_file
def test_a_link_out_of_the_directory_is_refused_unread(directory, file):
    (directory.parent / file).write_bytes((directory / file).read_bytes())
    (directory / file).unlink()
    (directory / file).symlink_to(directory.parent / file)
    assert "it is a link that leads out" in complaint(directory)


def test_links_of_a_hub_cache_are_followed_to_its_blobs_only(tmp_path):
    repository = tmp_path / "models--me--x"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in GOLDEN.iterdir():
        shutil.copyfile(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert Expert.load(snapshot).name == "golden"
    shutil.copyfile(GOLDEN / LAYOUT.info, tmp_path / "other.json")
    (snapshot / LAYOUT.info).unlink()
    (snapshot / LAYOUT.info).symlink_to("../../../other.json")
    assert "leads out" in complaint(snapshot)


@each_file
def test_a_pipe_or_a_folder_is_no_file(directory, file):
    (directory / file).unlink()
    os.mkfifo(directory / file)
    assert "not a regular file" in complaint(directory)
    (directory / file).unlink()
    (directory / file).mkdir()
    assert "not a regular file" in complaint(directory)


def test_a_pool_does_not_leave_its_folder(directory, tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "link").symlink_to(directory)
    with pytest.raises(PoolError, match="leads out of"):
        Pool.open(tmp_path / "pool")
    assert Pool.open(tmp_path / "pool" / "link").names == ("golden",)


def test_markup_in_an_expert_is_not_obeyed(directory, capsys):
    info = json.loads((directory / LAYOUT.info).read_text())
    info["base"]["id"] = "[/red]x[bold]"
    (directory / LAYOUT.info).write_text(json.dumps(info))
    with pytest.raises(SystemExit) as caught:
        main(["pool", str(directory)])
    assert caught.value.code == 0
    assert "[/red]x[bold]" in capsys.readouterr().out
