"""Full and read-only disks: complete or absent, and one line."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from odd_files import everything, one_line_of
from phatgoose.experts.importing import import_adapter
from phatgoose.routing.compose import compose, save
from training_runs import assert_same_expert, train


def adapter_of(expert: Path, to: Path) -> Path:
    """A copy without what makes an adapter an expert, which `import_adapter` would refuse."""
    return shutil.copytree(expert, to, ignore=shutil.ignore_patterns("phatgoose.*"))


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


@pytest.mark.parametrize("kilobytes", [4, 12, 24])
def test_a_full_disk_leaves_no_half_of_anything(disk, llama_pool, llama, tmp_path, kilobytes):
    folder, expert = disk(kilobytes), llama_pool.experts[0]
    adapter = adapter_of(expert.directory, tmp_path / "adapter")
    model = compose(llama_pool, llama, router="phatgoose")
    actions = {
        "expert": lambda: expert.save(folder / "expert"),
        "import": lambda: import_adapter(adapter, folder / "import"),
        "routed": lambda: save(model, folder / "routed"),
    }
    for action in actions.values():
        assert "No space left on device" in one_line_of(action)
        assert everything(folder) == set()
    disk(10_000)
    for action in actions.values():
        action()
    assert everything(folder) > {"expert", "import", "routed"}


def test_training_on_a_full_disk_is_told_and_goes_on_when_there_is_space(disk, llama, tmp_path):
    whole = train(llama, tmp_path / "whole")
    for kilobytes in (8, 40, 120):
        folder = disk(kilobytes)
        message = one_line_of(lambda: train(llama, folder / "expert", resume=True))  # noqa: B023
        assert "can't be written" in message
        assert not (folder / "expert").exists()
    expert = train(llama, disk(10_000) / "expert", resume=True)
    assert [path.name for path in folder.iterdir()] == ["expert"]
    assert_same_expert(expert, whole)
