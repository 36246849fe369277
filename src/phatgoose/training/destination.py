"""Where experts go: a directory, or a URL that fsspec can open (s3://…, gs://…).

Experts are always trained in a directory. For a URL that is a temporary one, and each part is
copied up as soon as it is complete: checkpoints, the trained adapter, the expert. An unfinished
expert is copied down before its training resumes, so it can resume on any machine.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import fsspec

from ..errors import ConfigError, ExpertError
from ..experts.expert import LAYOUT, Expert
from .unfinished import LOCK, discard_work, wait_for_work, work_of

__all__ = ["Destination", "ExpertFolder", "TrainedExpert", "expert_folder"]

SNAPSHOT = "snapshot.json"  # the files of unfinished work and their sizes, written last


@dataclass(frozen=True)
class TrainedExpert:
    """What is reported of a finished expert: its name, where it is, and its metrics."""

    name: str
    place: str
    metrics: Mapping[str, Any]


class ExpertFolder(Protocol):
    """Where experts go."""

    def place(self, name: str) -> str:
        """Where the expert `name` is, or will be."""

    def has(self, name: str) -> bool:
        """True when something of that name is there already."""

    def finished(self, name: str) -> TrainedExpert:
        """The finished expert `name`. Raises ExpertError when it can't be read."""

    def training(self, name: str, patience: float) -> AbstractContextManager[Destination]:
        """A context with the directory to train `name` in; the expert is here when it ends well.

        A lost worker's lock on unfinished work is waited for, up to `patience` seconds.
        """

    def portable(self) -> ExpertFolder:
        """The same folder for another process, which may have another working directory."""


@dataclass(frozen=True)
class Destination:
    """The directory to train an expert in; `on_saved` is to be called when a part is complete."""

    out: Path
    on_saved: Callable[[], None]


def expert_folder(out: str | Path) -> ExpertFolder:
    """The folder at `out`, a path or a URL. Raises ConfigError for a URL that can't be used."""
    if "://" not in str(out):
        return LocalFolder(Path(out))
    try:
        files, root = fsspec.core.url_to_fs(str(out))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{out} can't be used as a folder: {error}") from error
    return RemoteFolder(str(out).rstrip("/"), files, root.rstrip("/"))


@dataclass(frozen=True)
class LocalFolder:
    """A directory, shared by all workers where there are several."""

    path: Path

    def place(self, name: str) -> str:
        """Where the expert `name` is, or will be."""
        return str(self.path / name)

    def has(self, name: str) -> bool:
        """True when something of that name is there already."""
        return (self.path / name).exists()

    def finished(self, name: str) -> TrainedExpert:
        """The expert `name`; unfinished work left beside it is removed."""
        discard_work(self.path / name)
        expert = Expert.load(self.path / name)
        return TrainedExpert(expert.name, self.place(name), expert.info.metrics)

    @contextmanager
    def training(self, name: str, patience: float) -> Iterator[Destination]:
        """The directory itself, where complete parts stay."""
        wait_for_work(self.path / name, patience)
        yield Destination(self.path / name, lambda: None)

    def portable(self) -> LocalFolder:
        """The same by its absolute path."""
        return LocalFolder(self.path.absolute())


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of one of fsspec's file systems."""

    url: str
    files: Any  # an fsspec file system
    root: str

    def place(self, name: str) -> str:
        """Where the expert `name` is, or will be."""
        return f"{self.url}/{name}"

    def has(self, name: str) -> bool:
        """True when the whole expert is there: its description is copied last."""
        return bool(self.files.exists(f"{self.root}/{name}/{LAYOUT.info}"))

    def finished(self, name: str) -> TrainedExpert:
        """The expert `name`, from its description alone."""
        place = f"{self.root}/{name}/{LAYOUT.info}"
        try:
            metrics = json.loads(self.files.cat_file(place))["metrics"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ExpertError(f"{self.place(name)} can't be read: {error}.") from error
        return TrainedExpert(name, self.place(name), metrics)

    @contextmanager
    def training(self, name: str, patience: float) -> Iterator[Destination]:
        """A temporary directory with what was copied up of the expert's unfinished training."""
        above = f"{self.root}/.{name}.work"
        with tempfile.TemporaryDirectory(prefix="phatgoose-") as scratch:
            out = Path(scratch) / name
            work = work_of(out)
            try:
                self._fetch(above, work)
                yield Destination(out, lambda: self._keep(work, above))
                self._send(out, f"{self.root}/{name}")
                if self.files.exists(above):
                    self.files.rm(above, recursive=True)
            except OSError as error:
                raise ExpertError(f"{self.place(name)} can't be written: {error}.") from error

    def portable(self) -> RemoteFolder:
        """Itself: a URL is the same everywhere."""
        return self

    def _fetch(self, above: str, work: Path) -> None:
        """Copy unfinished work down, or nothing when its snapshot or a file of it is incomplete."""
        try:
            listed = json.loads(self.files.cat_file(f"{above}/{SNAPSHOT}"))
        except (FileNotFoundError, ValueError, RecursionError):
            return
        if not isinstance(listed, dict) or not all(_is_inside(file) for file in listed):
            return
        for file, size in listed.items():
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                self.files.get_file(f"{above}/{file}", str(work / file))
            except FileNotFoundError:
                size = -1
            if size < 0 or (work / file).stat().st_size != size:
                shutil.rmtree(work)
                return

    def _keep(self, work: Path, above: str) -> None:
        """Copy up what is new in `work`, then the list of its files; then remove what it lost."""
        sizes = {
            str(path.relative_to(work)): path.stat().st_size
            for path in sorted(work.rglob("*"))
            if path.is_file() and path.name != LOCK
        }
        known = self._sizes(above)
        for file, size in sizes.items():
            if known.get(file) != size:
                self._put(work / file, f"{above}/{file}")
        (work.parent / SNAPSHOT).write_text(json.dumps(sizes), encoding="utf-8")
        self._put_whole(work.parent / SNAPSHOT, f"{above}/{SNAPSHOT}")
        for file in known.keys() - sizes.keys():
            self.files.rm_file(f"{above}/{file}")

    def _sizes(self, above: str) -> dict[str, int]:
        """Sizes of the files copied up so far, by their path in the work."""
        if not self.files.exists(above):
            return {}
        self.files.invalidate_cache()
        found = self.files.find(above, detail=True)
        sizes = {path[len(above) + 1 :]: entry["size"] for path, entry in found.items()}
        return {path: size for path, size in sizes.items() if not path.startswith(SNAPSHOT)}

    def _send(self, directory: Path, place: str) -> None:
        """Copy an expert up, its description last."""
        files = sorted(directory.iterdir(), key=lambda path: path.name == LAYOUT.info)
        for path in files:
            self._put_whole(path, f"{place}/{path.name}")

    def _put_whole(self, path: Path, place: str) -> None:
        """Copy a file up under a random name, then rename it."""
        unfinished = f"{place}.unfinished-{secrets.token_hex(8)}"
        self._put(path, unfinished)
        self.files.mv(unfinished, place)

    def _put(self, path: Path, place: str) -> None:
        self.files.makedirs(place.rpartition("/")[0], exist_ok=True)
        self.files.put_file(str(path), place)


def _is_inside(file: str) -> bool:
    """True for a relative path that stays inside its folder."""
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts
