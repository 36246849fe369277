"""Measure every row of docs/performance.md's table and print it: `make bench`.

    python benchmarks/run.py [--rows prefill,linear] [--dtype float32] [--rounds 7] [--smoke]

The numbers go to a JSON file in `--out`. Only a quiet machine gives numbers worth
keeping; --smoke tries everything in tiny sizes, where they mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import against_arrow  # noqa: F401  # importing a subject enters its rows
import choosing  # noqa: F401
import measuring
import pool_reading  # noqa: F401
import routed_speed  # noqa: F401
import scoring  # noqa: F401
import training_speed  # noqa: F401
from bench import FULL, SMOKE, Bench
from findings import ROWS, Finding
from report import circumstances, table, write_json

HERE = Path(__file__).parent


def main() -> int:
    """Measure, print, write; 1 when a row failed."""
    options = _options()
    torch.set_num_threads(options.threads)
    if options.processor_time:
        measuring.clock = time.process_time
    warnings.simplefilter("ignore")
    sizes = SMOKE if options.smoke else FULL
    sizes = replace(sizes, rounds=options.rounds or sizes.rounds, dtype=options.dtype)
    bench = Bench(sizes, options.pools)
    where = {**circumstances(), "dtype": sizes.dtype}
    found: dict[str, Sequence[Finding]] = {}
    failed = []
    type_ = "" if sizes.dtype == FULL.dtype else f"-{sizes.dtype}"
    stem = f"{where['commit']}{type_}{'-smoke' if options.smoke else ''}"
    for name in options.rows:
        begun = time.perf_counter()
        try:
            found[name] = list(ROWS[name].measure(bench))
        except Exception:  # the other rows are measured all the same
            failed.append(name)
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        write_json(options.out / f"{stem}.json", found, where)
    print(table(found, where))
    if options.smoke:
        print("\nTiny sizes: these numbers mean nothing.")
    if failed:
        print(f"Failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows", type=_rows, default=list(ROWS), help=f"some of {','.join(ROWS)}; default: all"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default=FULL.dtype,
        help="float32 is for machines without instructions for bfloat16",
    )
    parser.add_argument("--rounds", type=int, help=f"rounds that count; default: {FULL.rounds}")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="for busy machines, with --threads 1: what others take isn't counted",
    )
    parser.add_argument("--pools", type=Path, default=HERE / ".pools", help="random experts' place")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def _rows(names: str) -> list[str]:
    chosen = names.split(",")
    for name in chosen:
        if name not in ROWS:
            raise argparse.ArgumentTypeError(f"no row {name!r}; there are {', '.join(ROWS)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
