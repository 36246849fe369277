"""The experts of a pool, each trained as one job that resumes when its worker is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from ..base.identity import BaseReference, recorded_id
from ..experts.expert import ExpertInfo
from ..jobs import BaseLocation, Engine
from ..tasks.suites.registry import TrainingTask
from .train_expert import finished_expert, train_expert
from .trainer import Hyperparameters


@dataclass(frozen=True)
class ExpertJob:
    """The job of training one expert; `resume` as in `train_expert`."""

    task: TrainingTask
    settings: Hyperparameters
    resume: bool = False

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def size(self) -> int:
        return self.settings.training.steps + self.settings.gate_steps

    def again(self) -> ExpertJob:
        return replace(self, resume=True)


def train_experts(
    base: str,
    jobs: Sequence[ExpertJob],
    *,
    out: Path,
    dtype: str = "auto",
    engine: Engine | None = None,
) -> Iterator[ExpertInfo]:
    """The records of the finished experts of `jobs` in the folder `out`.

    Each comes as soon as it is done, those in `out` already first, with a warning where their
    settings differ. `engine` None trains one after the other here. Raises as `train_expert`.
    """
    engine = engine or Engine()
    if engine.remote:
        jobs = [replace(job, task=job.task.portable()) for job in jobs]
    missing = []
    for job in jobs:
        if (out / job.name).exists():
            yield finished_expert(out / job.name, base, job.settings, resume=True).info
        else:
            missing.append(job)
    name = recorded_id(base)
    workshop = _ExpertWorkshop(BaseLocation(name, dtype, BaseReference(name)), out.absolute())
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
    base: BaseLocation
    out: Path

    @contextmanager
    def open(self) -> Iterator[Callable[[ExpertJob], ExpertInfo]]:
        base = self.base.load()

        def train(job: ExpertJob) -> ExpertInfo:
            out = self.out / job.name
            settings = vars(job.settings)
            return train_expert(base, job.task.load(), out=out, resume=job.resume, **settings).info

        yield train

    def portable(self) -> _ExpertWorkshop:
        return self
