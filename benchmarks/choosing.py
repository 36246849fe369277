"""What routers that choose for a whole prompt spend on the choice, beside a prefill of the base."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import phatgoose as pg
from bench import VOCABULARY, Bench, words
from findings import Finding, row
from measuring import side_by_side
from phatgoose.base.identity import twin
from phatgoose.experts.pool import Pool
from phatgoose.experts.statistics import prompt_statistics_of
from phatgoose.reader import open_reader
from phatgoose.routing.choice import Choice
from phatgoose.routing.compose import composition_of
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, PROMPT, can_embed, embed_texts
from routed_speed import prefill

ROUTERS = ("retrieval", "discriminant")
READ = 20  # random prompts that an expert's random statistics are of


@row("choosing", "choosing for a prompt / prefill of the base")
def measure_choosing(bench: Bench) -> Iterator[Finding]:
    """The choice of experts for a batch of prompts, in which no expert acts yet."""
    sizes = bench.sizes
    count = sizes.pools[0]
    rows, columns = sizes.prefill
    generator = random.Random(0)
    texts = [words(generator, columns) for _ in range(rows)]
    ids = bench.base.tokenizer(texts)["input_ids"]
    prompts = [row[:columns] for row in ids]
    batch = {"input_ids": torch.tensor(prompts), "attention_mask": torch.ones(rows, columns).long()}
    pool = with_statistics(bench, count)
    routers = [name for name in ROUTERS if name != "retrieval" or can_embed()]
    models = {name: pg.compose(pool, twin(bench.base), router=name) for name in routers}
    contenders = {name: _choosing(model, texts) for name, model in models.items()}
    timings = side_by_side({"base": prefill(bench.base.model, batch), **contenders}, sizes.rounds)
    base = timings["base"].median * 1e3 / rows
    for name in models:
        own = timings[name].median * 1e3 / rows
        note = f"{own:.1f} ms a prompt, the base's prefill {base:.1f}"
        case = f"{sizes.prefilled}, E = {count}: choice by {name}"
        yield Finding.of(case, timings, name, "base", note)


def _choosing(model: Any, texts: list[str]) -> Callable[[], Choice]:
    router = composition_of(model).chooser
    assert router is not None
    clients = itertools.count()  # a new one each time, for whom nothing is remembered
    return lambda: router.choose(texts, client=str(next(clients)))


def with_statistics(bench: Bench, count: int) -> Pool:
    """The pool of `count` random experts with random means, prompt statistics and embeddings."""
    seeds = torch.Generator().manual_seed(0)
    reader = open_reader()
    shape = reader.states(["a"]).shape[1:]
    generator = random.Random(0)
    inputs = [words(generator, len(VOCABULARY)) for _ in range(READ)]
    rows = embed_texts(inputs) if can_embed() else None
    experts = []
    for expert in Pool.open(bench.experts(count)).experts:
        states = torch.randn(READ, *shape, generator=seeds)
        measured = replace(
            expert,
            means={site: torch.randn(v.shape, generator=seeds) for site, v in expert.gates.items()},
            prompt_statistics=prompt_statistics_of(states),
            embeddings=None if rows is None else rows.roll(len(experts), dims=1),
            info=replace(
                expert.info,
                embedder=DEFAULT_EMBEDDER,
                embedding_form=PROMPT,
                reader=reader.reference,
                prompts_read=READ,
            ),
        )
        experts.append(measured)
    return Pool(tuple(experts))
