"""The experts of a pool, each trained as one job that resumes when its worker is lost.

They go to a folder, or to a URL that fsspec can open (s3://…): then they are trained in the user's
cache, and finished ones are copied up. Nothing locks a URL.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..base import Base, BaseReference, load_base, recorded_id
from ..errors import ExpertError
from ..experts.expert import LAYOUT, ExpertInfo, read_info
from ..files import first_line, user_cache
from ..jobs import BaseLocation, Engine, LocalEngine
from ..tasks.suites.registry import TrainingTask
from .train_expert import LOCK, check_finished, finished_expert, train_expert
from .trainer import Hyperparameters, is_first, join_processes, wait_for_all, work_of

PATIENCE = 60.0  # seconds to wait for the lock of a lost worker on another machine


@dataclass(frozen=True)
class ExpertFolder:
    """A folder of experts at a path or an fsspec URL; raises ExpertError where a URL fails."""

    at: str

    @property
    def is_url(self) -> bool:
        return "://" in self.at

    @property
    def path(self) -> Path:
        """The directory of this machine where experts are trained."""
        if self.is_url:
            return user_cache() / "training" / quote(self.at, safe="")
        return Path(self.at)

    def place(self, name: str) -> str:
        return f"{self.at.rstrip('/')}/{name}" if self.is_url else str(self.path / name)

    def has(self, name: str) -> bool:
        if not self.is_url:
            return (self.path / name).exists()
        with self._store("read") as (files, root):
            return bool(files.exists(f"{root}/{name}/{LAYOUT.info}"))

    def finished(self, name: str, base: Base | str, settings: Hyperparameters) -> ExpertInfo:
        """What a finished expert records; raises and warns as `check_finished`."""
        if not self.is_url:
            return finished_expert(self.path / name, base, settings, resume=True).info
        with self._store("read"):
            copy = fsspec.open_local(f"simplecache::{self.place(name)}/{LAYOUT.info}")
            info = read_info(Path(copy))
        check_finished(info, self.place(name), base, settings)
        return info

    def put(self, name: str) -> None:
        """Copy the expert that was finished in `path` to the URL, if it is one, and remove it."""
        wait_for_all()
        if not self.is_url or not is_first():
            return
        with self._store("written") as (files, root):
            files.makedirs(f"{root}/{name}", exist_ok=True)
            # The description last: an expert is there when that is.
            for file in sorted(
                (self.path / name).iterdir(), key=lambda file: file.name == LAYOUT.info
            ):
                files.put_file(str(file), f"{root}/{name}/{file.name}")
        shutil.rmtree(self.path / name)

    @contextmanager
    def _store(self, done: str) -> Iterator[tuple[Any, str]]:
        try:
            files, root = fsspec.core.url_to_fs(self.at)
            yield files, root.rstrip("/")
        except Exception as error:  # of any class: a store's own
            kept = f" Experts are kept in {self.path}: --resume uploads them."
            raise ExpertError(
                f"{self.at} can't be {done}: {first_line(error)}."
                f"{kept if done == 'written' else ''}"
            ) from error


@dataclass(frozen=True)
class ExpertJob:
    """The job of training one expert; `resume` and `restart` as in `train_expert`."""

    task: TrainingTask
    settings: Hyperparameters
    resume: bool = False
    restart: bool = False

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def group(self) -> str:
        return self.name  # experts share only the base, which every worker has

    @property
    def size(self) -> int:
        return self.settings.training.steps + self.settings.gate_steps

    def again(self) -> ExpertJob:
        return replace(self, resume=True, restart=False)


def train_experts(
    base: Base | str,
    jobs: Sequence[ExpertJob],
    *,
    out: str,
    dtype: str = "auto",
    engine: Engine | None = None,
) -> Iterator[ExpertInfo]:
    """The records of the finished experts of `jobs` in the folder or fsspec URL `out`.

    Each comes as soon as it is done, those in `out` already first, with a warning where their
    settings differ. `engine` None trains one after the other here. `dtype` is for a base given by
    name. Raises as `train_expert`.
    """
    engine, folder = engine or LocalEngine(), ExpertFolder(out)
    if engine.remote:
        jobs = [replace(job, task=job.task.portable()) for job in jobs]
    there = [job for job in jobs if folder.has(job.name)]
    for job in there:
        yield folder.finished(job.name, base, job.settings)
    missing = [job for job in jobs if job not in there]
    workshop = _ExpertWorkshop(base, dtype, folder, PATIENCE if engine.remote else 0.0)
    steps = sum(job.size for job in missing)
    hidden = None if engine.remote else True  # in this process each training shows its own
    with (
        tqdm(total=steps, desc=f"{len(missing)} experts", unit="step", disable=hidden) as bar,
        closing(engine.run(workshop, missing, bar)) as results,
    ):
        for _, info in results:
            yield info


@dataclass(frozen=True)
class _ExpertWorkshop:
    base: Base | BaseLocation | str
    dtype: str
    folder: ExpertFolder
    patience: float

    @contextmanager
    def open(self) -> Iterator[Callable[[ExpertJob], ExpertInfo]]:
        base = self.base
        join_processes()  # each loads it onto its own GPU
        if isinstance(base, BaseLocation):
            base = base.load()
        elif isinstance(base, str):
            base = load_base(base, dtype=self.dtype)

        def train(job: ExpertJob) -> ExpertInfo:
            if job.resume and self.folder.has(job.name):
                return self.folder.finished(job.name, base, job.settings)
            out, settings = self.folder.path / job.name, job.settings
            lock = work_of(out) / LOCK
            if self.patience and lock.exists():
                # A process on another machine may need a moment to notice that it lost its master.
                with suppress(Timeout), FileLock(lock).acquire(timeout=self.patience):
                    pass
            expert = train_expert(
                base,
                job.task.load(),
                out=out,
                peft=settings.peft,
                training=settings.training,
                gate_training=settings.gates,
                formatting=settings.formatting,
                resume=job.resume,
                restart=job.restart,
            )
            self.folder.put(job.name)
            return expert.info

        yield train

    def portable(self) -> _ExpertWorkshop:
        base, folder = self.base, self.folder
        if isinstance(base, Base):
            base = BaseLocation.of(base)
        elif isinstance(base, str):
            base = BaseLocation(recorded_id(base), self.dtype, BaseReference(base))
        if not folder.is_url:
            folder = ExpertFolder(str(folder.path.absolute()))
        return replace(self, base=base, folder=folder)
