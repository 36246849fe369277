"""Writing: complete or absent when disks are full or read-only, processes are killed or compete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phatgoose.base.loading import Base
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.errors import ConfigError, ExpertError, PhatgooseError, PoolError, RoutingError
from phatgoose.experts.expert import Expert, check_expert
from phatgoose.experts.importing.adapter import import_adapter
from phatgoose.experts.pool import Pool
from phatgoose.files.atomic import new_directory
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.tasks.task import Example, Task
from phatgoose.training.gates import train_gates
from phatgoose.training.train_expert import train_expert
from phatgoose.training.unfinished import discard_work, open_work

TASK = Task("t", tuple(Example(f"Say {i}", "yes") for i in range(8)))
FEW = {
    "training": Training(batch_size=4, steps=3, eval_every=1),
    "gate_training": GateTraining(gate_steps=2, statistics_examples=4),
}
HOLD = """
from filelock import FileLock
lock = FileLock({!r})
lock.acquire()
print("held", flush=True)
input()
"""


def mount(folder: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"can't mount here: {done.stderr.decode().strip()}")


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """`disk(kilobytes)`: an empty disk of that size; given again, the same one resized."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount small disks")
    folder = tmp_path / "disk"

    def of_size(kilobytes: int) -> Path:
        if folder.exists():
            mount(folder, "-o", f"remount,size={kilobytes}k")
        else:
            folder.mkdir()
            mount(folder, "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs")
        return folder

    yield of_size
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)  # mapped files keep it busy


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def told(action: Callable[[], object]) -> str:
    """The one line that `action` fails with."""
    with pytest.raises(PhatgooseError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kilobytes", [4, 12, 24])
def test_a_full_disk_leaves_no_half_of_anything(disk, llama_pool, llama, kilobytes):
    folder, expert = disk(kilobytes), llama_pool.experts[0]
    model = compose(llama_pool, llama)
    actions = {
        "expert": lambda: expert.save(folder / "expert"),
        "import": lambda: import_adapter(expert.directory, folder / "import"),
        "routed": lambda: save(model, folder / "routed"),
    }
    for action in actions.values():
        assert "No space left on device" in told(action)
        assert everything(folder) == set()
    disk(10_000)
    for action in actions.values():
        action()
    assert everything(folder) > {"expert", "import", "routed"}


def test_an_expert_is_kept_when_there_is_no_space_for_its_successor(disk, llama_pool):
    folder = disk(60)
    kept = llama_pool.experts[0].save(folder / "expert")
    before = {path.name: path.read_bytes() for path in kept.directory.iterdir()}
    assert "No space left" in told(lambda: kept.save(folder / "expert", overwrite=True))
    assert {path.name: path.read_bytes() for path in kept.directory.iterdir()} == before
    assert everything(folder) == {"expert", *(f"expert/{name}" for name in before)}


def train(base: Base, out: Path, **options: bool) -> Expert:
    return train_expert(base, TASK, out=out, peft=Lora(rank=2), **FEW, **options)


def test_training_on_a_full_disk_is_told_and_goes_on_when_there_is_space(disk, llama, tmp_path):
    whole = train(llama, tmp_path / "whole")
    sizes = [8, 40, 120]
    for kilobytes in sizes:
        folder = disk(kilobytes)
        message = told(lambda: train(llama, folder / "expert", resume=True))  # noqa: B023
        assert "can't be written" in message
        assert not (folder / "expert").exists()
    expert = train(llama, disk(10_000) / "expert", resume=True)
    assert everything(folder) == {
        "expert",
        *(f"expert/{p.name}" for p in expert.directory.iterdir()),
    }
    for file in ("adapter_model.safetensors", "phatgoose.safetensors"):
        assert (expert.directory / file).read_bytes() == (whole.directory / file).read_bytes()


def test_read_only_folders_are_told(disk, llama_pool, llama, tmp_path):
    folder = disk(1000)
    kept = llama_pool.experts[0].save(folder / "kept")
    mount(folder, "-o", "remount,ro")
    before = everything(folder)
    for action in (
        lambda: kept.save(folder / "expert"),
        lambda: kept.save(folder / "kept", overwrite=True),
        lambda: import_adapter(kept.directory, folder / "import"),
        lambda: train_gates(llama, kept.directory, TASK, out=folder / "gated", **FEW),
        lambda: save(compose(llama_pool, llama), folder / "routed"),
        lambda: Pool.open(folder).write_manifest(folder / "pool.json"),
    ):
        assert "Read-only file system" in told(action)
    assert everything(folder) == before
    assert check_expert(kept.directory) == []
    assert Expert.load(kept.directory).name == kept.name


def test_of_two_that_write_one_expert_the_first_stays_and_the_other_is_told(llama_pool, tmp_path):
    first, second = llama_pool.experts[:2]
    target = tmp_path / "expert"

    def late() -> None:
        with new_directory(target, ExpertError) as work:
            (work / "half").write_text("of the second")
            first.save(target)

    assert "exists already" in told(late)
    assert Expert.load(target).name == first.name
    assert everything(tmp_path) == {"expert", *(f"expert/{p.name}" for p in target.iterdir())}
    assert "exists already" in told(lambda: second.save(target))
    assert second.save(target, overwrite=True).name == second.name


def test_of_two_that_save_one_routed_model_the_first_stays(llama_pool, llama, tmp_path):
    model, target = compose(llama_pool, llama), tmp_path / "routed"
    with pytest.raises(RoutingError, match="exists already"), new_directory(target, RoutingError):
        save(model, target)
    assert {path.name for path in tmp_path.iterdir()} == {"routed"}
    load(target, detach(model))


def test_one_process_at_a_time_is_at_a_piece_of_work(tmp_path):
    out = tmp_path / "expert"
    with open_work(out, {"a": 1}, resume=False, restart=False) as work:
        (work / "checkpoint").write_text("1")
    lock = str(tmp_path / ".expert.work" / "lock")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    with other:
        assert other.stdout.readline() == b"held\n"
        for resume, restart in ((True, False), (False, True), (False, False)):
            with pytest.raises(ExpertError, match="Another process is at work"):  # noqa: SIM117
                with open_work(out, {"a": 1}, resume=resume, restart=restart):
                    pass
        assert (work / "checkpoint").exists()
        other.kill()
    with open_work(out, {"a": 1}, resume=True, restart=False) as again:
        assert (again / "checkpoint").read_text() == "1"


def test_unfinished_work_is_continued_or_thrown_away_as_asked(tmp_path):
    out = tmp_path / "expert"

    def opened(identity: int = 1, **how: bool) -> list[str]:
        given = {"resume": False, "restart": False, **how}
        with open_work(out, {"a": identity}, **given) as work:
            found = sorted(path.name for path in work.iterdir())
            (work / "folder").mkdir(exist_ok=True)
            return found

    assert opened() == ["lock", "run.json"]
    assert "resume" in told(opened)
    assert opened(resume=True) == ["folder", "lock", "run.json"]
    with pytest.raises(ConfigError, match="other settings"):
        opened(2, resume=True)
    assert opened(2, restart=True) == ["lock", "run.json"]
    discard_work(out)
    assert everything(tmp_path) == set()
    discard_work(out)


def test_what_was_left_beside_a_finished_expert_is_tidied_up(llama, tmp_path):
    expert = train(llama, tmp_path / "expert")
    with open_work(tmp_path / "expert", {}, resume=False, restart=False):
        pass
    assert train(llama, tmp_path / "expert", resume=True).info == expert.info
    assert {path.name for path in tmp_path.iterdir()} == {"expert"}
    gated = train_gates(llama, expert.directory, TASK, out=tmp_path / "gated", **FEW)
    with open_work(tmp_path / "gated", {}, resume=False, restart=False):
        pass
    again = train_gates(llama, expert.directory, TASK, out=tmp_path / "gated", resume=True, **FEW)
    assert again.info == gated.info
    assert {path.name for path in tmp_path.iterdir()} == {"expert", "gated"}


def test_a_manifest_is_written_whole(llama_pool, tmp_path):
    (tmp_path / "pool.json").mkdir()
    with pytest.raises(PoolError, match="can't be written"):
        llama_pool.write_manifest(tmp_path / "pool.json")
