"""Experts of strangers: whatever is done to a directory, what comes back is an expert or one line.

PHATGOOSE_FUZZ sets how many damaged directories are tried (docs/reliability.md has figures).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audited import unexpected, watched
from damage import damages, do_all
from damaged_experts import FILES, JSON_FILES, TENSOR_FILES, record_hashes
from paths import GOLDEN, GOLDENS
from phatgoose.apps.cli import main
from phatgoose.errors import ExpertError, PhatgooseError, PoolError
from phatgoose.experts.expert import LAYOUT, Expert, check_expert
from phatgoose.experts.pool import Pool
from phatgoose.files.strict import MOST_JSON_BYTES

KINDS = ("expert", "ia3", "bottleneck")  # one golden directory of each
EXAMPLES = int(os.environ.get("PHATGOOSE_FUZZ", "120"))
MOST_SECONDS = 5  # of the processor, for a directory of a few kilobytes
SECRET = "the secret of somebody else"

DAMAGES = damages(JSON_FILES, TENSOR_FILES, (LAYOUT.card,))


@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(DAMAGES, st.booleans(), st.sampled_from(KINDS))
def test_a_damaged_directory_is_an_expert_or_one_line(done, rehash, kind):
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
    assert f"{file} is a symbolic link that leads out" in complaint(directory)


def test_a_link_inside_the_directory_is_followed(directory):
    (directory / LAYOUT.info).rename(directory / "real.json")
    (directory / LAYOUT.info).symlink_to("real.json")
    assert Expert.load(directory).name == "golden"


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
    assert f"{file} is not a regular file" in complaint(directory)
    (directory / file).unlink()
    (directory / file).mkdir()
    assert f"{file} is not a regular file" in complaint(directory)


def test_a_pool_does_not_leave_its_folder(directory, tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "link").symlink_to(directory)
    with pytest.raises(PoolError, match="leads out of"):
        Pool.open(tmp_path / "pool")
    assert Pool.open(tmp_path / "pool" / "link").names == ("golden",)


def test_a_huge_description_is_refused_unread(directory):
    with (directory / LAYOUT.info).open("ab") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    assert f"at most {MOST_JSON_BYTES}" in complaint(directory)


def test_a_folder_whose_name_is_no_utf8_is_told_as_an_escape(directory, tmp_path, capsys):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/po\xffol"))
    shutil.copytree(directory, folder / "golden")
    with pytest.raises(SystemExit) as caught:
        main(["pool", str(folder)])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert r"po\udcffol" in told
    assert "not valid UTF-8" in told
    assert told.count("\n") == 1


def test_markup_in_an_expert_is_not_obeyed(directory, capsys):
    info = json.loads((directory / LAYOUT.info).read_text())
    info["base"]["id"] = "[/red]x[bold]"
    (directory / LAYOUT.info).write_text(json.dumps(info))
    with pytest.raises(SystemExit) as caught:
        main(["pool", str(directory)])
    assert caught.value.code == 0
    assert "[/red]x[bold]" in capsys.readouterr().out
