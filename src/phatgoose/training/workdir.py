"""Where unfinished work and finished experts lie: in a directory, or at a URL (s3://…, gs://…).

A run works in a folder beside its result, locked, and can resume there. Its name starts with a dot,
so that nothing takes it for a finished result. Experts for a URL that fsspec can open are trained
in the user's cache, and a finished one is copied up. Nothing locks a URL.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
from filelock import FileLock, Timeout

from ..base import BaseReference
from ..errors import ConfigError, ExpertError
from ..experts.expert import LAYOUT, Expert, ExpertInfo, expert_files, read_info
from ..files import WRITING_ERRORS, first_line, reason, user_cache, write_text
from .trainer import is_first, process_count, wait_for_all

IDENTITY, LOCK = "run.json", "lock"


@contextmanager
def open_work(
    out: Path, identity: Mapping[str, Any], *, resume: bool, restart: bool
) -> Iterator[Path]:
    """The folder `.<out's name>.work` beside `out`: new, or (`resume`) left by an earlier run.

    `identity` is what a run must share to resume the work: base, data and settings. The folder is
    locked while the context is open, or until the process is killed; of several processes of one
    training (`processes`) the first holds the lock. When the context ends and `out` is there, the
    work is removed. Raises ExpertError when `out` is there at first, when there is unfinished work
    and neither `resume` nor `restart` is set, another process holds the lock, or the folder can't
    be written; ConfigError when the work to resume has another identity.
    """
    work = work_of(out)
    if not is_first():
        wait_for_all()
        yield work
        return
    file, content = work / IDENTITY, json.dumps(identity, indent=2)
    try:
        _refuse_links(work)
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK)
        with lock.acquire(timeout=0):
            if out.exists():
                raise ExpertError(f"Another process has made {out} meanwhile.")
            if restart or not file.is_file():  # a restart that was killed leaves no identity
                _empty(work)
            if not file.is_file():
                write_text(file, content, ExpertError)
            elif not resume:
                raise ExpertError(
                    f"Unfinished work was found in {work}; use resume to continue it or restart to "
                    f"throw it away."
                )
            elif file.read_text(encoding="utf-8") != content:
                raise ConfigError(
                    f"The unfinished work in {work} had other settings, data or another base; "
                    f"repeat them, or use restart to throw it away."
                )
            wait_for_all()
            yield work
        if out.exists():
            discard_work(out)  # its lock is free: some file systems remove no open file
    except Timeout as problem:
        raise ExpertError(f"Another process is at work on {out}, in {work}.") from problem
    except WRITING_ERRORS as problem:
        raise ExpertError(f"{out} can't be written: {reason(problem)}.") from problem


def discard_work(out: Path) -> None:
    shutil.rmtree(work_of(out), ignore_errors=True)


def wait_for_work(out: Path, seconds: float) -> None:
    """Return when no process is at work on `out`, or after `seconds`."""
    lock = work_of(out) / LOCK
    if seconds > 0 and lock.exists():
        # A process on another machine may need a moment to notice that its connection is lost.
        with suppress(Timeout), FileLock(lock).acquire(timeout=seconds):
            pass


def work_of(out: Path) -> Path:
    """The folder of unfinished work on `out`, beside it."""
    return out.parent / f".{out.name}.work"


def _refuse_links(work: Path) -> None:
    for path in (work, *(work.rglob("*") if not work.is_symlink() else ())):
        if path.is_symlink():
            raise ExpertError(f"{path} is a symbolic link, which no unfinished work is; remove it.")


def _empty(work: Path) -> None:
    # First of all: if it is killed here, what is left counts as no work, without an identity.
    (work / IDENTITY).unlink(missing_ok=True)
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@dataclass(frozen=True)
class TrainedExpert:
    """What is reported of a finished expert: its name, where it is, base, metrics and settings."""

    name: str
    place: str
    base: BaseReference
    metrics: Mapping[str, Any]
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, info: ExpertInfo, place: str) -> TrainedExpert:
        return cls(info.name, place, info.base, info.metrics, info.hyperparameters)


@dataclass(frozen=True)
class LocalFolder:
    """A directory of experts, shared by all workers where there are several."""

    path: Path

    def place(self, name: str) -> str:
        return str(self.path / name)

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def finished(self, name: str) -> TrainedExpert:
        expert = Expert.load(self.path / name)
        discard_work(self.path / name)
        return TrainedExpert.of(expert.info, self.place(name))

    def begin(self, name: str, *, restart: bool) -> None:
        """What is to be done before the expert is trained in `path`: nothing."""

    def send(self, name: str) -> None:
        """Put the expert that was finished in `path` where it belongs; here it is there already."""

    def portable(self) -> LocalFolder:
        return LocalFolder(self.path.absolute())


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of experts in one of fsspec's file systems. Raises ExpertError where it fails."""

    url: str
    files: Any  # an fsspec file system
    root: str

    @property
    def path(self) -> Path:
        """The directory of this machine where its experts are trained."""
        return user_cache() / "training" / quote(self.url, safe="")

    def place(self, name: str) -> str:
        return f"{self.url}/{name}"

    def has(self, name: str) -> bool:
        with self._reported(name, "read"):
            return bool(self.files.exists(f"{self.root}/{name}/{LAYOUT.info}"))

    def finished(self, name: str) -> TrainedExpert:
        with self._reported(name, "read"), tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / LAYOUT.info
            self.files.get_file(f"{self.root}/{name}/{LAYOUT.info}", str(copy))
            info = read_info(copy)
        self._clear(name)
        return TrainedExpert.of(info, self.place(name))

    def begin(self, name: str, *, restart: bool) -> None:
        """See that the URL can be written, before hours of work; with `restart` begin anew."""
        trial = f"{self.root}/.{name}.trial"
        with self._reported(name, "written"):
            self.files.makedirs(self.root, exist_ok=True)
            self.files.pipe_file(trial, b"")
            self.files.rm_file(trial)
        if restart:
            self._clear(name)

    def send(self, name: str) -> None:
        """Copy the expert that was finished in `path` to the URL, and remove it here."""
        place, info = f"{self.root}/{name}", self.path / name / LAYOUT.info
        kept = f" The expert is kept in {self.path / name}: --resume uploads it."
        with self._reported(name, "written", kept):
            for left in expert_files():  # of a copy that was cut short
                if self.files.exists(f"{place}/{left}"):
                    self.files.rm_file(f"{place}/{left}")
            self.files.makedirs(place, exist_ok=True)
            for file in set((self.path / name).iterdir()) - {info}:
                self.files.put_file(str(file), f"{place}/{file.name}")
            # Whole and last: an expert is there when its description is.
            self.files.put_file(str(info), f"{place}/{LAYOUT.info}.unfinished")
            self.files.mv(f"{place}/{LAYOUT.info}.unfinished", f"{place}/{LAYOUT.info}")
        self._clear(name)

    def _clear(self, name: str) -> None:
        shutil.rmtree(self.path / name, ignore_errors=True)
        discard_work(self.path / name)

    @contextmanager
    def _reported(self, name: str, done: str, then: str = "") -> Iterator[None]:
        try:
            yield
        except Exception as error:
            told = f"{self.place(name)} can't be {done}: {first_line(error)}.{then}"
            raise ExpertError(told) from error

    def portable(self) -> RemoteFolder:
        return self  # a URL is the same everywhere


ExpertFolder = LocalFolder | RemoteFolder


def expert_folder(out: str | Path) -> ExpertFolder:
    """The folder at a path or URL. Raises ConfigError for a URL that can't be used."""
    if "://" not in str(out):
        return LocalFolder(Path(out))
    if process_count() > 1:
        raise ConfigError(f"{out} is for one process; several need a folder that all of them see.")
    try:
        files, root = fsspec.core.url_to_fs(str(out))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{out} can't be used as a folder: {error}") from error
    return RemoteFolder(str(out).rstrip("/"), files, root.rstrip("/"))
