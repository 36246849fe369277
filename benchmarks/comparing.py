"""A comparison of single experts, beside a loop of lm-evaluation-harness over the same models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lm_eval.models.huggingface import HFLM

import phatgoose as pg
from bench import Bench, write_base
from findings import Finding, at_least, row
from measuring import ratio, side_by_side
from scoring import ranked_rows, requests_of

__all__ = ["measure_comparison"]

MOST_ROUNDS = 3  # the loop takes minutes


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
