"""The experts of a pool, each trained as one job that resumes when its worker is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from ..base import Base, BaseReference, load_base, recorded_id
from ..config import Formatting, GateTraining, Lora, Peft, Training
from ..jobs import BaseLocation, Engine, LocalEngine
from ..tasks.suites.registry import TrainingTask
from .train_expert import (
    check_trained_on,
    settings_of_training,
    train_expert,
    warn_of_other_settings,
)
from .trainer import TrainingCallback, join_processes
from .workdir import ExpertFolder, TrainedExpert, expert_folder, wait_for_work

PATIENCE = 60.0  # seconds to wait for the lock of a lost worker on another machine

TrainJob = Callable[["ExpertJob"], TrainedExpert]


@dataclass(frozen=True)
class ExpertJob:
    """The job of training one expert; `resume` and `restart` as in `train_expert`."""

    task: TrainingTask
    training: Training
    gate_training: GateTraining
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
        gates, examples = self.gate_training, self.task.entry.train_examples
        training = self.training if examples is None else self.training.on(examples)
        return training.steps + (0 if gates.joint else gates.gate_steps)

    def again(self) -> ExpertJob:
        return replace(self, resume=True, restart=False)


def train_experts(
    base: Base | str,
    jobs: Sequence[ExpertJob],
    *,
    out: str,
    dtype: str = "auto",
    peft: Peft | None = None,
    formatting: Formatting | None = None,
    engine: Engine | None = None,
) -> Iterator[TrainedExpert]:
    """The finished experts of `jobs` in the folder or fsspec URL `out`, each as soon as it is done.

    Those in `out` already come first, with a warning where their settings differ. `engine` None
    trains one after the other here. `dtype` is for a base given by name. Raises as `train_expert`.
    """
    engine, peft, formatting = engine or LocalEngine(), peft or Lora(), formatting or Formatting()
    folder = expert_folder(out)
    if engine.remote:
        jobs = [replace(job, task=job.task.portable()) for job in jobs]
    there = [job for job in jobs if folder.has(job.name)]
    for job in there:
        found = folder.finished(job.name)
        check_trained_on(base, found.base, found.place)
        settings = settings_of_training(peft, job.training, job.gate_training, formatting)
        warn_of_other_settings(found.place, found.hyperparameters, settings)
        yield found
    missing = [job for job in jobs if job not in there]
    patience = PATIENCE if engine.remote else 0.0
    workshop = _ExpertWorkshop(base, dtype, folder, peft, formatting, patience)
    steps = sum(job.size for job in missing)
    own_bar = None if engine.remote else True  # in this process each training shows its own
    with (
        tqdm(total=steps, desc=f"{len(missing)} experts", unit="step", disable=own_bar) as bar,
        closing(engine.run(workshop, missing, bar)) as results,
    ):
        for job, trained in results:
            yield replace(trained, place=folder.place(job.name))


@dataclass(frozen=True)
class _ExpertWorkshop:
    base: Base | BaseLocation | str
    dtype: str
    folder: ExpertFolder
    peft: Peft
    formatting: Formatting
    patience: float

    @contextmanager
    def open(self, tell: Callable[[int], None]) -> Iterator[TrainJob]:
        base = self.base
        join_processes()  # each loads it onto its own GPU
        if isinstance(base, BaseLocation):
            base = base.load()
        elif isinstance(base, str):
            base = load_base(base, dtype=self.dtype)

        def train(job: ExpertJob) -> TrainedExpert:
            if job.resume and self.folder.has(job.name):
                return self.folder.finished(job.name)
            out = self.folder.path / job.name
            self.folder.begin(job.name, restart=job.restart)
            wait_for_work(out, self.patience)
            expert = train_expert(
                base,
                job.task.load(),
                out=out,
                peft=self.peft,
                training=job.training,
                gate_training=job.gate_training,
                formatting=self.formatting,
                resume=job.resume,
                restart=job.restart,
                callback=TrainingCallback(tell),
            )
            self.folder.send(job.name)
            return TrainedExpert.of(expert.info, self.folder.place(job.name))

        yield train

    def portable(self) -> _ExpertWorkshop:
        base = self.base
        if isinstance(base, Base):
            base = BaseLocation.of(base)
        elif isinstance(base, str):
            base = BaseLocation(recorded_id(base), self.dtype, BaseReference(base))
        return replace(self, base=base, folder=self.folder.portable())
