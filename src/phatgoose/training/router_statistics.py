"""Statistics: what a contributor may share beside gates, for other routers (METHOD section 3.3).

Mean activations serve average-activation, embeddings of training inputs serve retrieval. They are
measured when an expert is trained, or later for one that exists.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..base.fingerprint import check_base
from ..base.loading import Base, load_base
from ..base.offloading import input_device
from ..base.sites import Site, find_sites
from ..base.token_masks import watch_inputs
from ..config import Formatting, GateTraining
from ..errors import ConfigError, ExpertError
from ..experts.applied import ModifiedLinear, put_in
from ..experts.expert import EXPERT_FILES, MOST_EMBEDDINGS, Expert
from ..experts.input_format import recorded_formatting
from ..experts.kinds.kind import SiteModule
from ..files.quoting import one_line
from ..tasks.collating import Collator
from ..tasks.cuts import Cuts
from ..tasks.embeddings import DEFAULT_EMBEDDER, embed_examples
from ..tasks.encoding import Encoder, TokenPair, batches_of_tokens
from ..tasks.task import Task

__all__ = [
    "Statistics",
    "at_full_strength",
    "mean_activations",
    "measure",
    "statistics_of",
]

TOKEN_BUDGET = 4096


def measure(
    expert: Expert | str | Path,
    base: Base | str,
    task: Task,
    *,
    examples: int = 1000,
    means: bool = True,
    embeddings: bool = True,
    embedder: str = DEFAULT_EMBEDDER,
    seed: int | None = None,
    formatting: Formatting | None = None,
) -> Expert:
    """The expert with mean activations and embeddings measured on `task`, its directory rewritten.

    `task` should be the data that the expert was trained on: its training split is measured (a
    random sample of at most `examples`; embeddings at most 1000), as METHOD sections 3.3 and 5
    describe. `seed` (of the sample, and of the validation split that is set apart) and `formatting`
    default to what the expert records of its training, so that the same numbers come out as then.
    What isn't asked for stays as it was; adapter and gates stay the same bytes and numbers; the
    model card is written anew.

    Raises ConfigError when nothing is asked for or embedding isn't possible, WrongBaseError when
    `base` isn't the expert's, ExpertError when the directory holds foreign files, which rewriting
    would lose, TaskError when the task can't be used.
    """
    expert = expert if isinstance(expert, Expert) else Expert.load(expert)
    if not (means or embeddings):
        raise ConfigError("There is nothing to measure: ask for means, embeddings or both.")
    settings = GateTraining(
        statistics_examples=examples, means=means, embeddings=embeddings, embedder=embedder
    )
    _refuse_foreign_files(expert.directory)
    base = load_base(base) if isinstance(base, str) else base
    check_base(expert.info.base, base.reference, f"expert {expert.name!r}")
    recorded = expert.info.hyperparameters
    if seed is None:
        seed = recorded["seed"] if isinstance(recorded.get("seed"), int) else 0
    encoder = Encoder.of(base, formatting or _recorded_formatting(expert))
    found = statistics_of(base, expert.modules, task.with_validation(seed), encoder, settings, seed)
    found.cuts.tell(task.name)
    measured = replace(
        expert,
        means=expert.means if found.means is None else found.means,
        embeddings=expert.embeddings if found.embeddings is None else found.embeddings,
    )
    info = replace(
        expert.info,
        embedder=expert.info.embedder if found.embeddings is None else embedder,
        hyperparameters={
            **recorded,
            "statistics_examples": examples,
            "means": bool(measured.means),
            "embeddings": measured.embeddings is not None,
            **({"embedder": embedder} if embeddings else {}),
        },
    )
    return replace(measured, info=info).save(expert.directory, overwrite=True)


@dataclass(frozen=True)
class Statistics:
    """What was measured, None where it wasn't asked for: `means` by site, `embeddings` in rows.

    `cuts` tells what was cut of the inputs whose means were taken.
    """

    means: Mapping[str, Tensor] | None = None
    embeddings: Tensor | None = None
    cuts: Cuts = field(default_factory=Cuts)


def statistics_of(
    base: Base,
    modules: Mapping[str, SiteModule],
    task: Task,
    encoder: Encoder,
    settings: GateTraining,
    seed: int,
) -> Statistics:
    """The statistics that `settings` asks for, of the expert `modules` on a sample of `task.train`.

    Means are measured with the expert at full strength, as it acts when it is routed to. Raises
    ExpertError when the expert doesn't fit the base, ConfigError when embedding isn't possible.
    """
    means, embeddings, cuts = None, None, Cuts()
    count = settings.statistics_examples
    if settings.embeddings:
        chosen = _sample(range(len(task.train)), min(count, MOST_EMBEDDINGS), seed)
        examples = [task.train[i] for i in chosen]
        truncation = encoder.formatting.truncation
        embeddings = embed_examples(examples, settings.embedder, truncation)
    if settings.means:
        examples = [task.train[i] for i in _sample(range(len(task.train)), count, seed)]
        pairs = [encoder.pair(row.input, row.target, row.passage) for row in examples]
        cuts = encoder.cuts(pairs)
        sites = {name: site for name, site in find_sites(base.model).items() if name in modules}
        collator = Collator(base.model, base.tokenizer.pad_token_id)
        with at_full_strength(base.model, modules):
            means = mean_activations(base.model, sites, pairs, collator, task.name)
    return Statistics(means, embeddings, cuts)


def at_full_strength(
    model: PreTrainedModel, modules: Mapping[str, SiteModule]
) -> AbstractContextManager[dict[str, ModifiedLinear]]:
    """The expert at its sites in `model`, ungated, while the context is open.

    Raises ExpertError when a site or its shape doesn't fit the model.
    """
    return put_in(model, modules, ModifiedLinear)


def mean_activations(
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    pairs: Sequence[TokenPair],
    collator: Collator,
    label: str = "",
) -> dict[str, Tensor]:
    """The mean input of each site over all real tokens of `pairs`, float32 [n] by site name.

    Teacher forcing: prompt and right target are passed in one go, padding left out (METHOD section
    5, Average Activation; the released code keeps only the last generated step in the decoder).
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(site: Site, u: Tensor, real: Tensor | None) -> None:
        tokens = u.flatten(0, -2) if real is None else u[real]
        totals[site.name] = totals.get(site.name, 0) + tokens.double().sum(dim=0)
        counts[site.name] = counts.get(site.name, 0) + tokens.shape[0]

    lengths = [pair.length for pair in pairs]
    with (
        torch.no_grad(),
        watch_inputs(model, sites, add),
        tqdm(
            total=len(pairs), desc=f"{one_line(label)}: means", unit="example", disable=None
        ) as bar,
    ):
        model.eval()
        for batch in batches_of_tokens(lengths, TOKEN_BUDGET):
            inputs = collator([pairs[i] for i in batch])
            inputs.pop("labels")
            inner = model if model.config.is_encoder_decoder else model.base_model
            device = input_device(model)
            inner(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False)
            bar.update(len(batch))
    return {site: (totals[site] / counts[site]).float().cpu() for site in sites}


def _sample(indices: range, count: int, seed: int) -> list[int]:
    """At most `count` of the indices, the same ones for the same seed, in order."""
    return sorted(random.Random(seed).sample(indices, min(count, len(indices))))


def _recorded_formatting(expert: Expert) -> Formatting | None:
    """The formatting an expert was trained with, as far as it records one."""
    where = f"Expert {expert.name!r}, hyperparameters"
    return recorded_formatting(expert.info.hyperparameters, where)


def _refuse_foreign_files(directory: Path) -> None:
    foreign = {path.name for path in directory.iterdir()} - set(EXPERT_FILES)
    if foreign:
        raise ExpertError(
            f"{directory} also holds {', '.join(sorted(foreign))}, which rewriting the expert "
            f"would lose; move that away first."
        )
