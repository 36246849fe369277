"""Statistics for other routers, measured when an expert is trained, or later (paper section 4.2).

Mean activations are for Average Activation, embeddings of training inputs for Retrieval, readings
of prompts for router discriminant, which isn't the paper's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base import Base, check_base, load_base, number_format
from ..config import Formatting, GateTraining, Training
from ..errors import ConfigError, ExpertError
from ..experts.expert import MOST_EMBEDDINGS, Expert, expert_files, recorded_formatting
from ..experts.kind import ModifiedLinear, SiteModule, applied
from ..experts.statistics import PromptStates, readings_of
from ..passes import ActsOn
from ..sites import Site, find_sites
from ..tasks.embeddings import PAPER_TEXT, embed_texts, paper_texts, prompt_texts
from ..tasks.encoding import Cuts, Encoder, TokenPair
from ..tasks.prompt_passes import read_pairs, read_prompts
from ..tasks.task import Task, draw
from .trainer import Hyperparameters, Run


def measure(
    expert: Expert | str | Path,
    base: Base | str | Path,
    task: Task,
    settings: GateTraining,
    *,
    seed: int | None = None,
    formatting: Formatting | None = None,
) -> Expert:
    """The expert with the statistics of `settings` measured on `task`, its directory rewritten.

    `task` should be the data that the expert was trained on. A random sample of its training split
    is measured: at most `statistics_examples`, for embeddings at most 1000. `seed` (of the sample
    and of the validation split) and `formatting` default to what the expert records of its
    training, which gives the same numbers as then. What isn't asked for stays as it is in the
    directory by then, as do adapter and gates; the model card is written again.

    Raises ConfigError when nothing is asked for or embedding isn't possible, WrongBaseError when
    `base` isn't the expert's, ExpertError when the directory holds foreign files, which rewriting
    would lose, or has become another expert meanwhile, TaskError when the task can't be used.
    """
    expert = expert if isinstance(expert, Expert) else Expert.load(expert)
    if not (settings.means or settings.readings or settings.embeddings):
        raise ConfigError("There is nothing to measure: ask for means, readings or embeddings.")
    foreign = {path.name for path in expert.directory.iterdir()} - set(expert_files())
    if foreign:
        raise ExpertError(
            f"{expert.directory} also holds {', '.join(sorted(foreign))}, which rewriting the "
            f"expert would lose; move that away first."
        )
    base = load_base(base) if isinstance(base, str | Path) else base
    check_base(expert.info.base, base.reference, f"expert {expert.name!r}")
    recorded = expert.info.hyperparameters
    if seed is None:
        seed = recorded["seed"] if isinstance(recorded.get("seed"), int) else 0
    if formatting is None:
        formatting = recorded_formatting(recorded, f"Expert {expert.name!r}, hyperparameters")
    hyperparameters = Hyperparameters(None, Training(seed=seed), settings)
    encoder, place = Encoder.of(base, formatting), expert.directory.resolve()
    task = task.with_validation(seed)
    run = Run(base, task, encoder, hyperparameters, place, expert.name, expert.acts_on)
    measured = statistics_of(run, expert.modules)
    measured.cuts.report(task.name)
    now = Expert.load(place)  # another process may have measured something else meanwhile
    if now.info.adapter_sha256 != expert.info.adapter_sha256:
        raise ExpertError(f"{place} has become another expert while it was measured.")
    return _with_statistics(now, measured, settings).save(place, overwrite=True)


@dataclass(frozen=True)
class Statistics:
    """What was measured, None where it wasn't asked for: `means` by site, `embeddings` in rows.

    `readings` are those of `readings_of`; `cuts` counts the inputs that were cut before they were
    passed through the base. `measured_in` is the base's `number_format`, if it read any.
    """

    means: Mapping[str, Tensor] | None = None
    readings: Mapping[str, Tensor] | None = None
    embeddings: Tensor | None = None
    cuts: Cuts = field(default_factory=Cuts)
    measured_in: str | None = None


def statistics_of(run: Run, modules: Mapping[str, SiteModule]) -> Statistics:
    """The statistics that the run's settings ask for, of the expert `modules` on a sample.

    Means are measured with the expert at full strength, as it acts when it is routed to, readings
    without it. Of an expert that acts on prompts' ends, means are those of the tokens that it acts
    on. Raises ExpertError when the expert doesn't fit the base, ConfigError when embedding isn't
    possible.
    """
    settings, seed = run.settings.gates, run.settings.training.seed
    model, label, encoder = run.base.model, run.task.name, run.encoder
    means, readings, embeddings = None, None, None
    examples = draw(run.task.train, settings.statistics_examples, seed)
    pairs = encoder.pairs(examples)
    prompts = [pair.prompt for pair in pairs]
    if settings.embeddings:
        texts = paper_texts(examples)
        if settings.embedding_form != PAPER_TEXT:
            texts = prompt_texts(encoder.tokenizer, prompts)
        embeddings = embed_texts(draw(tuple(texts), MOST_EMBEDDINGS, seed), settings.embedder)
    if settings.readings:
        model.eval()
        readings = readings_of(read_prompts(model, prompts, PromptStates(model), label))
    if settings.means:
        sites = {name: site for name, site in find_sites(model).items() if name in modules}
        padding = run.base.tokenizer.pad_token_id
        with applied(model, modules, ModifiedLinear):
            means = mean_activations(model, sites, pairs, padding, label, run.acting)
    measured_in = number_format(model) if settings.means or settings.readings else None
    return Statistics(means, readings, embeddings, encoder.cuts(pairs), measured_in)


def _with_statistics(expert: Expert, measured: Statistics, settings: GateTraining) -> Expert:
    parts = ("means", "readings", "embeddings")
    new = {part: value for part in parts if (value := getattr(measured, part)) is not None}
    result = replace(expert, **new)
    measured_in = measured.measured_in or expert.info.measured_in
    kept = any(part not in new and expert.has(part) for part in ("means", "readings"))
    if kept and measured_in != expert.info.measured_in:
        measured_in = None  # of two bases
    how: dict[str, Any] = {}
    if "embeddings" in new:
        how = {"embedder": settings.embedder, "embedding_form": settings.embedding_form}
    recorded = {
        **expert.info.hyperparameters,
        "statistics_examples": settings.statistics_examples,
        **{part: result.has(part) for part in parts},
        **how,
    }
    info = replace(expert.info, hyperparameters=recorded, measured_in=measured_in, **how)
    return replace(result, info=info)


def mean_activations(
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    pairs: Sequence[TokenPair],
    pad_token_id: int,
    label: str | None = None,
    acting: ActsOn | None = None,
) -> dict[str, Tensor]:
    """The mean input of each site over all real tokens of `pairs`, float32 [n] by site name.

    Prompt and right target pass in one go (paper section 4.2, Average Activation; the released code
    keeps the decoder's last step only). Zero at a site that no token reached.
    """
    totals = {
        name: torch.zeros(site.in_features, dtype=torch.float64) for name, site in sites.items()
    }
    counts = Counter[str]()

    def add(site: Site, u: Tensor) -> None:
        totals[site.name] += u.double().sum(dim=0).cpu()
        counts[site.name] += len(u)

    read_pairs(model, sites, pairs, pad_token_id, add, label, acting)
    return {name: (total / max(counts[name], 1)).float() for name, total in totals.items()}
