"""Whose gate wins depends on who reads the prompt: the table of readers.

    python research/readers.py POOL ROWS OUT.json [--limit 10] [--figure OUT.png]
    python research/readers.py - - research/decoders/readers.jsonl#RUN,… [--figure OUT.png]

Runs by the package of commit 6aa0f67a, in which bases read prompts (README.md).

The second form tells what is there, means over RUNs; docs/figures/readers.png is of held_in. ROWS
is a folder with a task file for each expert of the pool, such as runs/research/data/own-new. Each
row's prompt and right answer pass through the base, through the task's own expert, and through
another one (drawn by the row's number). At every target module and token the vectors of all experts
are scored as router phatgoose does it: trained gates, and mean activations. Printed are the shares
of (module, token) pairs at which the task's own vector is highest, and the reader's, at the
prompt's tokens, its last token and the answer's; then the same for the discriminants of the blocks,
for each of the prompt's tokens alone, by the mean over the tokens so far, and over the prompt.
Intervals are 95 %, over tasks drawn anew.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from phatgoose.base.loading import Base
from phatgoose.base.sites import Site, find_sites, headless
from phatgoose.base.token_masks import watch_blocks, watch_inputs
from phatgoose.config import Routing
from phatgoose.experts.adapter import ModifiedLinear, applied
from phatgoose.experts.pool import Pool
from phatgoose.routing.open_model import loaded_base
from phatgoose.routing.routers.phatgoose import PhatgooseRouter, standardise
from phatgoose.routing.routers.router import router_of
from phatgoose.tasks.batching import Collator
from phatgoose.tasks.encoding import Encoder, TokenPair
from phatgoose.tasks.loading import load_task

EPS = 1e-5
VECTORS = ("gates", "means")
Found = Mapping[str, Mapping[str, list[float]]]  # by task and line: the own share, the reader's


def main() -> None:
    """Print the table and write every task's shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pool")
    parser.add_argument("rows", type=Path)
    parser.add_argument("out")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    found = read(given.out)
    if given.pool != "-":
        pool = Pool.open([given.pool])
        readers = Readers(pool, loaded_base(pool))
        for name in tqdm([name for name in pool.names if name not in found], unit="task"):
            task = load_task(next(given.rows.glob(f"{name}.*")))
            pairs = readers.encoder.pairs(task.evaluation_examples(given.limit, 0))
            found[name] = readers.shares(pool.names.index(name), pairs)
            Path(given.out).write_text(json.dumps(found, indent=1))
    tell(found, len(found))
    if given.figure:
        draw(found, len(found)).savefig(given.figure)


def read(place: str) -> Found:
    """Every task's lines in FILE, if it is there; or those of FILE#RUN,…, means over RUNs."""
    path, _, runs = place.partition("#")
    if not runs:
        return json.loads(Path(path).read_text()) if Path(path).exists() else {}
    rows = [
        row
        for row in map(json.loads, Path(path).read_text().splitlines())
        if row["run"] in runs.split(",")
    ]
    return {
        task: {
            line: torch.tensor([row["lines"][line] for row in rows if row["task"] == task])
            .mean(dim=0)
            .tolist()
            for line in rows[0]["lines"]
        }
        for task in dict.fromkeys(row["task"] for row in rows)
    }


class Readers:
    """The experts of a pool as readers of prompts, and the vectors that are scored."""

    def __init__(self, pool: Pool, base: Base) -> None:
        self.pool, self.base = pool, base
        self.encoder = Encoder.for_model(base.model.eval(), base.tokenizer)
        self.collate = Collator(base.model, base.tokenizer.pad_token_id)
        self.sites = {n: s for n, s in find_sites(base.model).items() if n in set(pool.sites)}
        self.routers = {
            (kind, site): PhatgooseRouter(standardise(pool.vectors(kind, site).float()), 1, EPS)
            for kind in VECTORS
            for site in self.sites
        }
        router = router_of(Routing(router="discriminant:place=whole,per_block=1"))
        self.discriminant = router.chooser(router.tables(pool))

    def shares(self, own: int, pairs: list[TokenPair]) -> dict[str, list[float]]:
        """For each line of the table the shares of the own and of the reader's vector."""
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3))
        others = [z for z in range(len(self.pool)) if z != own]
        for row, pair in enumerate(pairs):
            for label, reader in (
                ("base", None),
                ("own", own),
                ("other", others[row % len(others)]),
            ):
                for line, winners in self.winners(pair, reader):
                    mine = 0 if reader is None else (winners == reader).sum()
                    total = torch.tensor([(winners == own).sum(), mine, winners.numel()])
                    sums[f"{label}, {line}"] += total
        return {line: (s[:2] / s[2]).tolist() for line, s in sums.items()}

    def winners(self, pair: TokenPair, reader: int | None) -> Iterator[tuple[str, Tensor]]:
        """Lines of the table with the experts whose vectors are highest, [modules, tokens]."""
        n = len(pair.prompt)
        best, blocks = defaultdict(list), {}

        def see(site: Site, u: Tensor, _: Tensor | None) -> None:
            for kind in VECTORS:
                best[kind].append(self.routers[kind, site.name].affinities(u[0]).argmax(dim=-1))

        modules: Mapping = self.pool.experts[reader].modules if reader is not None else {}
        reads = applied(self.base.model, modules, ModifiedLinear) if modules else nullcontext()
        inputs = self.collate([replace(pair, target=pair.target[:-1])])  # the last predicts nothing
        inputs.pop("labels")
        depth = range(self.discriminant.depth)
        with (
            reads,
            torch.no_grad(),
            watch_inputs(self.base.model, self.sites, see),
            watch_blocks(self.base.model, depth, lambda b, h: blocks.update({b: h[0].float()})),
        ):
            headless(self.base.model)(**inputs, use_cache=False)
        places = {
            "prompt": slice(0, n - 1),
            "last token": slice(n - 1, n),
            "answer": slice(n, None),
        }
        for kind in VECTORS:
            for place, where in places.items():
                yield f"{kind}, {place}", torch.stack(best[kind])[:, where]
        states = torch.stack([blocks[b] for b in depth], dim=1)  # [tokens, blocks, d]
        so_far = states.cumsum(0) / torch.arange(1, len(states) + 1)[:, None, None]
        for line, read in {
            "each token alone": states[:n],
            "mean over the tokens so far": so_far[:n],
            "mean over the prompt": so_far[n - 1 : n],
        }.items():
            # [tokens, 2 places, blocks, d], of which only the mean is looked at
            scores = self.discriminant.scores(read[:, None].expand(-1, 2, -1, -1))
            yield f"discriminant of the block, {line}", scores.argmax(dim=-1).T


def summary(found: Found, line: str) -> tuple[Tensor, Tensor]:
    """The own and the reader's share in per cent [2], means over tasks, and intervals [2, 2]."""
    draws = torch.randint(len(found), (2000, len(found)), generator=torch.manual_seed(0))
    values = torch.tensor([shares[line] for shares in found.values()]).mul(100)
    ends = values[draws].mean(dim=1).quantile(torch.tensor([0.025, 0.975]), dim=0)
    return values.mean(dim=0), ends.T


def tell(found: Found, experts: int) -> None:
    """Print the means over tasks, with intervals."""
    print(f"{len(found)} tasks, {experts} experts: chance {100 / experts:.0f} %")
    print("| read by | vectors, where | the task's own | the reader's |\n|---|---|---|---|")
    for line in next(iter(found.values())):
        means, ends = summary(found, line)
        cells = [f"{m:.0f} [{a:.0f}, {b:.0f}]" for m, (a, b) in zip(means, ends, strict=True)]
        reader, _, what = line.partition(", ")
        print(f"| {reader} | {what} | {cells[0]} | {cells[1] if reader != 'base' else ''} |")


def draw(found: Found, experts: int) -> Figure:
    """Whose trained gate is highest at the prompt's tokens, by who reads; beside, discriminants."""
    figure = Figure(figsize=(7.5, 3), dpi=150)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"gates, prompt": "trained gates", "means, prompt": "mean activations"}
    for panel, (what, title) in zip(panels, titles.items(), strict=True):
        for place, reader in enumerate(("base", "own", "other")):
            means, ends = summary(found, f"{reader}, {what}")
            bars = [("the task's own", 0, "tab:blue")]
            bars += [("the reader's", 1, "tab:orange")] if reader == "other" else []
            for side, (label, which, colour) in enumerate(bars):
                at = place + 0.38 * side - 0.19 * (len(bars) - 1)
                error = (means[which] - ends[which][:, None].T).abs().T
                panel.bar(at, means[which], 0.36, color=colour, label=label, yerr=error, capsize=3)
        panel.axhline(100 / experts, color="0.5", linestyle=":", label="chance")
        panel.set_title(title, fontsize=10)
        panel.set_xticks(range(3), ["the base", "the task's\nexpert", "another\nexpert"])
        panel.set_xlabel("the prompt is read by")
    panels[0].set_ylabel("highest at … % of tokens\nand modules")
    handles, labels = panels[0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    panels[1].legend(known.values(), known, fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
