"""Where unfinished work and finished experts lie: in a directory, or at a URL (s3://…, gs://…).

A run works in a folder beside its result, locked, and can resume there. Its name starts with a dot,
so that nothing takes it for a finished result. For a URL that fsspec can open, experts are trained
in a temporary directory, and each part is copied up as soon as it is complete: checkpoints, the
trained adapter, the expert. An unfinished expert is copied down before its training resumes, so it
can resume on any machine. Nothing locks a URL, and only one process trains an expert that goes to
it.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
from filelock import FileLock, Timeout

from ..base.fingerprint import BaseReference
from ..errors import ConfigError, ExpertError, PhatgooseError
from ..experts.expert import LAYOUT, Expert, ExpertInfo, expert_files
from ..files.atomic import WRITING_ERRORS, is_there, write_text
from ..files.strict import first_line, reason
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


TRIAL = "trial"  # an empty file that shows that one can write
SNAPSHOT = "snapshot.json"  # the files of unfinished work and their sizes, written last
UNFINISHED = ".unfinished-"  # between a file's name and random digits, until it is whole


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
class Destination:
    """The directory to train an expert in; `on_saved` is to be called when a part is complete."""

    out: Path
    on_saved: Callable[[], None]


@dataclass(frozen=True)
class LocalFolder:
    """A directory of experts, shared by all workers where there are several."""

    path: Path

    def place(self, name: str) -> str:
        return str(self.path / name)

    def has(self, name: str) -> bool:
        return is_there(self.path / name)

    def finished(self, name: str) -> TrainedExpert:
        expert = Expert.load(self.path / name)
        discard_work(self.path / name)
        return TrainedExpert.of(expert.info, self.place(name))

    @contextmanager
    def training(
        self, name: str, patience: float, *, restart: bool = False
    ) -> Iterator[Destination]:
        """The directory itself; a lost worker's lock is waited for up to `patience` seconds."""
        wait_for_work(self.path / name, patience)
        yield Destination(self.path / name, lambda: None)

    def portable(self) -> LocalFolder:
        return LocalFolder(self.path.absolute())


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of experts in one of fsspec's file systems. Raises ExpertError where it fails."""

    url: str
    files: Any  # an fsspec file system
    root: str

    def place(self, name: str) -> str:
        return f"{self.url}/{name}"

    def has(self, name: str) -> bool:
        with self._reported(name, "read"):
            return bool(self.files.exists(f"{self.root}/{name}/{LAYOUT.info}"))

    def finished(self, name: str) -> TrainedExpert:
        place = f"{self.root}/{name}/{LAYOUT.info}"
        with self._reported(name, "read"):
            info = json.loads(self.files.cat_file(place))
            settings = info.get("hyperparameters", {})
            base = BaseReference(**info["base"])
            found = TrainedExpert(name, self.place(name), base, info["metrics"], settings)
        with suppress(Exception):  # the expert is whole, whoever may remove what
            self._kept_work(name).remove()
        return found

    @contextmanager
    def training(
        self, name: str, patience: float, *, restart: bool = False
    ) -> Iterator[Destination]:
        """A temporary directory with what was copied up of unfinished training."""
        if process_count() > 1:
            raise ConfigError(
                f"{self.url} is for one process; {process_count()} processes that train one "
                f"expert need a folder that all of them see."
            )
        kept = self._kept_work(name)
        with tempfile.TemporaryDirectory(prefix="phatgoose-") as scratch:
            out = Path(scratch) / name
            work = work_of(out)

            def keep() -> None:
                with self._reported(name, "written"):
                    kept.keep(work)

            with self._reported(name, "written"):
                if restart:
                    kept.remove()
                kept.fetch(work)
                kept.try_out(Path(scratch))  # rather than after the first steps
            yield Destination(out, keep)
            with self._reported(name, "written"):
                self._send(out, f"{self.root}/{name}")
                kept.remove()

    @contextmanager
    def _reported(self, name: str, done: str) -> Iterator[None]:
        try:
            yield
        except PhatgooseError:
            raise
        except Exception as error:
            told = f"{self.place(name)} can't be {done}: {first_line(error)}."
            raise ExpertError(told) from error

    def portable(self) -> RemoteFolder:
        return self  # a URL is the same everywhere

    def _kept_work(self, name: str) -> KeptWork:
        return KeptWork(self.files, f"{self.root}/.{name}.work")

    def _send(self, directory: Path, place: str) -> None:
        names = {path.name for path in directory.iterdir()}
        for name in sorted(names - {LAYOUT.info}):
            _put_whole(self.files, directory / name, f"{place}/{name}")
        self._remove_left_overs(place, names)
        # The description last: an expert is there when its description is.
        _put_whole(self.files, directory / LAYOUT.info, f"{place}/{LAYOUT.info}")

    def _remove_left_overs(self, place: str, names: set[str]) -> None:
        # fsspec remembers listings, but other machines write here too.
        self.files.invalidate_cache()
        for entry in self.files.ls(place, detail=True):
            name = entry["name"].rpartition("/")[2]
            ours = name.partition(UNFINISHED)[0] in expert_files() and entry["type"] == "file"
            if ours and name not in names:
                self.files.rm_file(f"{place}/{name}")


ExpertFolder = LocalFolder | RemoteFolder


def expert_folder(out: str | Path) -> ExpertFolder:
    """The folder at a path or URL. Raises ConfigError for a URL that can't be used."""
    if "://" not in str(out):
        return LocalFolder(Path(out))
    try:
        files, root = fsspec.core.url_to_fs(str(out))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{out} can't be used as a folder: {error}") from error
    return RemoteFolder(str(out).rstrip("/"), files, root.rstrip("/"))


class Stamp(NamedTuple):
    """What changes with a file: its size, and when it was written, in nanoseconds."""

    size: int
    written: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)


@dataclass
class KeptWork:
    """The copy of one expert's unfinished work in the folder `above` of an fsspec file system.

    `own` holds the files that this process has copied up or down, as they were then: another run's
    file may have the same name and size, and other content.
    """

    files: Any
    above: str
    own: dict[str, Stamp] = field(default_factory=dict)

    def fetch(self, work: Path) -> None:
        """Copy it down to `work`; when its list or a listed file is incomplete, remove it all."""
        try:
            listed = json.loads(self.files.cat_file(f"{self.above}/{SNAPSHOT}"))
        except FileNotFoundError:
            return
        except (ValueError, RecursionError):
            listed = None
        if not self._is_fetched(listed, work):
            shutil.rmtree(work, ignore_errors=True)
            self.remove()

    def _is_fetched(self, listed: object, work: Path) -> bool:
        if not isinstance(listed, dict) or not all(map(_is_inside, listed)):
            return False
        for file, size in listed.items():
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                self.files.get_file(f"{self.above}/{file}", str(work / file))
            except FileNotFoundError:
                return False
            self.own[file] = Stamp.of(work / file)
            if self.own[file].size != size:
                return False
        return True

    def try_out(self, scratch: Path) -> None:
        trial = scratch / TRIAL
        trial.touch()
        _put(self.files, trial, f"{self.above}.{TRIAL}")
        self.files.rm_file(f"{self.above}.{TRIAL}")
        trial.unlink()

    def keep(self, work: Path) -> None:
        """Copy up what is new in `work`, then the list of its files; then remove what it lost."""
        stamps = {
            path.relative_to(work).as_posix(): Stamp.of(path)
            for path in sorted(work.rglob("*"))
            if path.is_file() and path.name != LOCK
        }
        there = self._sizes()
        for file, stamp in stamps.items():
            if self.own.get(file) != stamp or there.get(file) != stamp.size:
                _put(self.files, work / file, f"{self.above}/{file}")
                self.own[file] = stamp
        sizes = {file: stamp.size for file, stamp in stamps.items()}
        (work.parent / SNAPSHOT).write_text(json.dumps(sizes), encoding="utf-8")
        # The list after what it lists, and before what it no longer lists goes.
        _put_whole(self.files, work.parent / SNAPSHOT, f"{self.above}/{SNAPSHOT}")
        for file in there.keys() - sizes.keys():
            self.files.rm_file(f"{self.above}/{file}")

    def remove(self) -> None:
        self.own.clear()
        self.files.invalidate_cache()
        # The list first: without it the rest counts for nothing.
        for place in (f"{self.above}/{SNAPSHOT}", self.above):
            if self.files.exists(place):
                self.files.rm(place, recursive=True)

    def _sizes(self) -> dict[str, int]:
        self.files.invalidate_cache()
        if not self.files.exists(self.above):
            return {}
        found = self.files.find(self.above, detail=True)
        sizes = {path[len(self.above) + 1 :]: entry["size"] for path, entry in found.items()}
        return {path: size for path, size in sizes.items() if not path.startswith(SNAPSHOT)}


def _put_whole(files: Any, path: Path, place: str) -> None:
    unfinished = f"{place}{UNFINISHED}{secrets.token_hex(8)}"
    _put(files, path, unfinished)
    files.mv(unfinished, place)


def _put(files: Any, path: Path, place: str) -> None:
    files.makedirs(place.rpartition("/")[0], exist_ok=True)
    files.put_file(str(path), place)


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts
