"""A comparison of single experts, beside a loop of lm-evaluation-harness over the same models."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from lm_eval.models.huggingface import HFLM

import phatgoose as pg
from bench import Bench, words, write_base
from choosing import with_statistics
from findings import Finding, at_least, row
from measuring import in_turns, ratio, side_by_side
from phatgoose.evaluation.shared_prompts import SharedPrompts
from scoring import ranked_rows, requests_of

__all__ = ["measure_comparison", "measure_together"]

MOST_ROUNDS = 3  # the loop takes minutes
ROUTERS = ("phatgoose", "discriminant", "merged", "average-activation", "arrow", "spectr")
NEW_TOKENS = 4


@row("comparison", "compare")
def measure_comparison(bench: Bench) -> Iterator[Finding]:
    """`compare` of the base and single experts, and a loop of HFLMs, one for each model.

    Both begin with files: ours loads the base once, the loop once a model, and PEFT the adapter.
    What lm-eval does around its models (tasks, prompts, metrics, reports) is left out.
    """
    sizes = bench.sizes
    folders = bench.experts(sizes.compared)
    rows = ranked_rows(sizes.ranked)
    examples = pg.load_task(rows, name="ranking").evaluation_examples(None)
    requests = requests_of(examples)
    with tempfile.TemporaryDirectory() as work:
        base, suite = write_base(bench.base, Path(work) / "base"), Path(work) / "suite"
        suite.mkdir()
        (suite / "ranking.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        rounds = min(sizes.rounds, MOST_ROUNDS)
        outs = iter([Path(work) / f"comparison-{i}" for i in range(1 + rounds)])

        def ours() -> None:
            pool, methods = pg.Pool.open(folders), ["base", "best-individual"]
            pg.compare(pool, [suite], methods, out=next(outs), base=base)

        def theirs() -> None:
            for adapter in (None, *map(str, folders)):
                harness = HFLM(
                    pretrained=base,
                    peft=adapter,
                    dtype=sizes.dtype,
                    device="cpu",
                    batch_size=sizes.ranked_batch,
                )
                harness.loglikelihood(requests, disable_tqdm=True)

        timings = side_by_side({"harness": theirs, "compare": ours}, rounds)
    cells = 1 + len(folders)
    yield Finding.of(
        f"{sizes.base} and {len(folders)} experts, {len(examples)} examples: loop of HFLM / ours",
        ratio(timings["harness"], timings["compare"]),
        target=at_least(3),
        note=f"{60 * cells / timings['compare'].median:.0f} cells a minute",
        details={"seconds": {name: timing.median for name, timing in timings.items()}},
    )


@row("together", "compare, prompts read once / by every row")
def measure_together(bench: Bench) -> Iterator[Finding]:
    """`compare` of the base, single experts that act from a prompt's end on, and six routers.

    Choices are ranked, and answers generated. Times are the processor's, of all threads, since
    minutes go by from one turn to the next.
    """
    for size in bench.sizes.together:
        yield from read_together(bench, *size)


def read_together(bench: Bench, experts: int, examples: int, longest: int) -> Iterator[Finding]:
    words_of = random.Random(0)
    pool = bench.at_ends(with_statistics(bench, experts))
    inputs = [words(words_of, longest) for _ in range(examples)]
    options = [[words(words_of, 2) for _ in range(4)] for _ in range(examples)]
    ranked = [
        {"input": text, "target": some[0], "choices": list(dict.fromkeys(some)), "split": "test"}
        for text, some in zip(inputs, options, strict=True)
    ]
    written = [{"input": text, "target": "a", "split": "test"} for text in inputs]
    with tempfile.TemporaryDirectory() as work:
        folders = (Path(work) / str(i) for i in itertools.count())

        def compared(rows: list[dict[str, Any]], apart: bool) -> Callable[[], float]:
            task = pg.load_task(rows, name="task")

            def seconds() -> float:
                serve = mock.patch.object(SharedPrompts, "serve", return_value=False)
                with serve if apart else nullcontext():
                    begun = time.process_time()
                    pg.compare(
                        pool,
                        [task],
                        ["base", "best-individual", *ROUTERS],
                        out=next(folders),
                        base=bench.base,
                        max_new_tokens=NEW_TOKENS,
                    )
                    return time.process_time() - begun

            return seconds

        rounds = min(bench.sizes.rounds, MOST_ROUNDS)
        for what, rows in (("ranked choices", ranked), (f"{NEW_TOKENS} tokens", written)):
            ways = {"apart": compared(rows, apart=True), "once": compared(rows, apart=False)}
            timings = in_turns(ways, rounds, warm=0)
            yield Finding.of(
                f"{bench.sizes.base}, {experts} experts and {len(ROUTERS)} routers, {examples} "
                f"prompts of {longest} words, {what}",
                ratio(timings["apart"], timings["once"]),
                target=at_least(5),
                details={"seconds": {name: timing.median for name, timing in timings.items()}},
            )
