"""One training run: an expert's base, data and settings, and where the expert goes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..base.fingerprint import dtype_name
from ..base.loading import Base, load_base
from ..base.sites import find_sites
from ..config import Formatting, GateTraining, Peft, Training
from ..errors import BaseModelError, ExpertError
from ..experts.adapter import kind_for
from ..experts.expert import Expert
from ..experts.expert_info import check_name
from ..files.left_overs import is_there
from ..files.quoting import shortened
from ..tasks.embeddings import load_embedder
from ..tasks.encoding import Encoder
from ..tasks.loading import given_task
from ..tasks.prompt_passes import read_pairs
from ..tasks.task import Task
from . import processes
from .progress import TrainingCallback
from .unfinished import discard_work, work_of

__all__ = ["TrainingRun", "finished_expert", "settings_of_training", "warn_of_other_settings"]

STATISTICS = (
    "statistics_examples",
    "means",
    "readings",
    "embeddings",
    "embedder",
    "embedding_form",
)


@dataclass(frozen=True)
class TrainingRun:
    """The training of the expert `name`, to be written to `out`.

    `task` has a validation split; `digest` is that of the task as it was given.
    """

    base: Base
    task: Task
    digest: str
    encoder: Encoder
    training: Training
    gate_training: GateTraining
    out: Path
    name: str
    callback: TrainingCallback

    @classmethod
    def of(
        cls,
        base: Base | str | Path,
        task: Task | str | Path,
        out: Path,
        *,
        training: Training | None,
        gate_training: GateTraining | None,
        formatting: Formatting | None,
        name: str | None,
        callback: TrainingCallback | None = None,
    ) -> TrainingRun:
        """The run with these settings, None for defaults; a base given by name is loaded.

        What is made last, after hours perhaps, is refused here: raises ConfigError where embeddings
        are wanted and their embedder can't be loaded, RoutingError where means are and the base
        pads inside. Raises ExpertError for a name that can't be an expert's, TaskError when the
        task can't be used.
        """
        check_name(name or out.name)
        task = given_task(task)
        gate_training = gate_training or GateTraining()
        if gate_training.embeddings:
            load_embedder(gate_training.embedder)
        processes.join()
        training = training or Training()
        base = load_base(base) if isinstance(base, str | Path) else base
        if not isinstance(base, Base):
            raise BaseModelError(
                f"base is a {type(base).__name__}; wanted its name, its folder, or a loaded Base "
                f"(phatgoose.base.loading.load_base)."
            )
        run = cls(
            base=base,
            task=task.with_validation(training.seed),
            digest=task.digest,
            encoder=Encoder.of(base, formatting),
            training=training,
            gate_training=gate_training,
            out=out,
            name=name or out.name,
            callback=callback or TrainingCallback(),
        )
        if gate_training.means:
            run._rehearse_means()
        return run

    def _rehearse_means(self) -> None:
        """Read one example as means are measured."""
        model, padding = self.base.model, self.base.tokenizer.pad_token_id
        pairs = self.encoder.pairs(self.task.validation[:1])
        read_pairs(model, find_sites(model), pairs, padding, lambda *_: None)

    @property
    def work(self) -> Path:
        """The folder of its unfinished work."""
        return work_of(self.out)

    def identity(self, *shape: Peft, **more: str) -> dict[str, Any]:
        """What unfinished work must share to be resumed by this run, for `open_work`.

        Statistics are measured anew at the end, so they may be others.
        """
        settings = (*shape, self.training, self.gate_training, self.encoder.formatting)
        return {
            "base": self.base.fingerprint,
            "dtype": dtype_name(self.base.model.dtype),
            **more,
            "task": self.digest,
            "settings": [
                {name: value for name, value in asdict(each).items() if name not in STATISTICS}
                for each in settings
            ],
        }


def finished_expert(out: Path, settings: Mapping[str, Any], *, resume: bool) -> Expert | None:
    """The expert that an earlier run finished at `out`, None where nothing is.

    Warns where it records other `settings` than these. Raises ExpertError when something is there
    and not to be resumed.
    """
    if not is_there(out):
        return None
    if not resume:
        raise ExpertError(f"{out} exists already; choose another place, or resume to keep it.")
    expert = Expert.load(out)
    discard_work(out)  # not before: it may be all that there is
    warn_of_other_settings(str(out), expert.info.hyperparameters, settings)
    return expert


def settings_of_training(
    peft: Peft, training: Training, gates: GateTraining, formatting: Formatting
) -> dict[str, Any]:
    """What an expert of these settings records of them, for `warn_of_other_settings`."""
    shape = {"peft": kind_for(peft).name, **asdict(peft)}
    return {**shape, **asdict(training), **asdict(gates), **asdict(formatting)}


def warn_of_other_settings(
    place: str, recorded: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Warn that the finished expert at `place` is kept, where what it records isn't `settings`.

    Those of statistics, which can be measured later, are left out, and whatever it doesn't record.
    """
    pairs = {
        name: (_value_of(name, recorded), _value_of(name, settings))
        for name in settings
        if name in recorded and name not in STATISTICS
    }
    other = [
        f"{name} {shortened(found, 40)}, not {shortened(wanted, 40)}"
        for name, (found, wanted) in pairs.items()
        if found != wanted
    ]
    if other:
        warnings.warn(
            f"{place} is kept as it is, with other settings: {'; '.join(other)}.", stacklevel=4
        )


def _value_of(name: str, settings: Mapping[str, Any]) -> Any:
    """A setting's value; a rate of gates that is None is the expert's."""
    value = settings[name]
    is_expert_s = name == "gate_learning_rate" and value is None
    return settings.get("learning_rate") if is_expert_s else value
