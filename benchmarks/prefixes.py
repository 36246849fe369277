"""The first token of a prompt that begins as the ones before, answered by several experts in turn.

    python benchmarks/prefixes.py POOL [--experts 8] [--tokens 1000] [--rounds 5]

Every expert of POOL (repeated up to `--experts`) answers a prompt with the same first `--tokens`
tokens and an end of its own, on the server's engine: once each with the beginnings of prompts kept,
and without. Once the experts act on all tokens, once from the last four on. Times are of reading
the prompt and of the first token; what is printed are medians of `--rounds` and their ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice

import torch

import phatgoose as pg
from measuring import ratio, side_by_side
from phatgoose.apps.server.local.engine import Batch
from phatgoose.apps.server.local.prefixes import MIB, PrefixStore
from phatgoose.apps.server.local.runner import ModelRunner
from phatgoose.apps.server.local.sequences import ActiveSequence
from phatgoose.apps.server.requests import Decoding
from phatgoose.base import Base, load_base, twin
from phatgoose.experts.pool import Pool
from phatgoose.passes import ActsOn

TAIL = 4
ENDS = 8  # tokens of each prompt's own


def main() -> None:
    """Measure, and print a line for each kind of experts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pool")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    pool, base = Pool.open([given.pool]), load_base("smollm2")
    for label, acts_on in (("all tokens", None), (f"the last {TAIL} tokens", ActsOn(TAIL))):
        runners = runners_of(pool, base, acts_on, given.experts)
        shared = torch.randint(100, 20000, (given.tokens,), generator=torch.manual_seed(0)).tolist()
        both = {
            "kept": first_tokens(runners, shared, 1024 * MIB),
            "not kept": first_tokens(runners, shared, 0),
        }
        timings = side_by_side(both, given.rounds)
        times = {name: timing.median / given.experts * 1e3 for name, timing in timings.items()}
        print(
            f"{given.experts} experts in turn that act on {label}, {given.tokens} tokens shared: "
            f"{times['not kept']:.0f} ms to the first token, with beginnings kept "
            f"{times['kept']:.0f} ms, ratio {ratio(timings['not kept'], timings['kept']).value:.1f}"
        )


def runners_of(pool: Pool, base: Base, acts_on: ActsOn | None, count: int) -> list[ModelRunner]:
    """One runner for each expert alone, over the same base."""
    found = []
    for expert in islice(cycle(pool.experts), count):
        info = replace(expert.info, acts_on=acts_on and acts_on.record())
        model = pg.compose(Pool((replace(expert, info=info),)), twin(base), router="merged")
        found.append(ModelRunner(model, base.tokenizer))
    return found


def first_tokens(runners: list[ModelRunner], shared: list[int], room: int) -> Callable[[], None]:
    """An action that lets every runner read a new prompt and say its first token."""
    ends = torch.Generator().manual_seed(1)

    def act() -> None:
        store = PrefixStore(room)
        for runner in runners:
            own = torch.randint(100, 20000, (ENDS,), generator=ends).tolist()
            prompt = [*shared, *own]
            (routed,) = runner.routings_of([prompt])
            wish = Decoding(max_tokens=1, temperature=0, ignores_end=True)
            with torch.inference_mode():
                Batch(runner, store).join(
                    [ActiveSequence(runner, prompt, wish, lambda _: None, routed=routed)]
                )

    return act


if __name__ == "__main__":
    main()
