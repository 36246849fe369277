"""Rank classification: time beside lm-evaluation-harness."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import phatgoose as pg
from bench import Bench, words
from findings import Finding, row
from measuring import side_by_side
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.task import Example

# A word is a token here. Inputs and choices are about as long as in T0's held-out and BIG-bench's
# tasks: the inputs' median and spread, the deciles of the longest choice.
MEDIAN_WORDS, LOG_SPREAD, SHORTEST, LONGEST = 69, 0.75, 8, 400
CHOICES, CHOICE_WORDS = 4, (1, 1, 1, 1, 2, 3, 3, 6, 8, 11)


@row("ranking", "rank classification")
def measure_ranking(bench: Bench) -> Iterator[Finding]:
    """`evaluate` and lm-eval's `HFLM` on the base model, the same examples with four choices.

    A batch of `evaluate` holds at most as many tokens as the longest rows of HFLM's batch.
    """
    sizes, base = bench.sizes, bench.base
    task = pg.load_task(ranked_rows(sizes.ranked), name="ranking")
    encoder = Encoder.of(base)
    examples = task.evaluation_examples(None)
    prompts = [len(encoder.prompt(example.input)) for example in examples]
    choices = [
        [len(encoder.target(example.input, choice).tokens) for choice in example.choices]
        for example in examples
    ]
    longest = max(prompt + max(each) for prompt, each in zip(prompts, choices, strict=True))
    harness = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=sizes.ranked_batch)
    requests = requests_of(examples)

    def ours() -> None:
        pg.evaluate(base, task, token_budget=sizes.ranked_batch * longest)

    def theirs() -> None:
        harness.loglikelihood(requests, disable_tqdm=True)

    what = f"{sizes.base}, {len(examples)} examples, {CHOICES} choices"
    timings = side_by_side({"harness": theirs, "evaluate": ours}, sizes.rounds)
    case = f"{what}: HFLM / evaluate, batches of {sizes.ranked_batch}"
    note = "choices of one token HFLM computes in one pass too"
    yield Finding.of(case, timings, "harness", "evaluate", note)


def ranked_rows(examples: int) -> list[dict[str, Any]]:
    """Rows of a task of random examples with different choices."""
    generator = random.Random(0)
    rows = []
    for _ in range(examples):
        drawn = MEDIAN_WORDS * generator.lognormvariate(0, LOG_SPREAD)
        text = words(generator, min(max(round(drawn), SHORTEST), LONGEST))
        length, choices = generator.choice(CHOICE_WORDS), list[str]()
        while len(choices) < CHOICES:
            choice = words(generator, length)
            choices += [choice] if choice not in choices else []
        rows.append({"input": text, "target": choices[0], "choices": choices, "split": "test"})
    return rows


def requests_of(examples: Sequence[Example]) -> list[Instance]:
    """What lm-evaluation-harness asks of a model for these examples."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return [
        Instance("loglikelihood", {}, (example.input, f" {choice}"), index)
        for example in examples
        for index, choice in enumerate(example.choices)
    ]
