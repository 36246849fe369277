"""Which router finds the task of a prompt in a wording that no expert has seen.

    python research/new_wordings.py DATA OUT [--tasks A,B] [--prompts 100]

DATA is what `render_tasks.py` writes. No expert is needed: of each task, the base and the embedder
read `--prompts` training prompts and 40 rows of own-new, once, into OUT. Printed are shares of
prompts whose own task scores highest: with one training wording of each task left out and asked
about (`development`, by which settings are chosen), and for own-new (`held out`).
"""

from __future__ import annotations

import argparse
import json
import random
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from phatgoose.base import Base, load_base
from phatgoose.evaluation.intervals import interval_of
from phatgoose.experts.statistics import PARTS, PromptStates, moments_of, readings_of
from phatgoose.routing.routers.discriminant import PromptDiscriminant, line_of
from phatgoose.routing.routers.prompt import Tables
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, embed_texts
from phatgoose.tasks.prompt_passes import read_prompts

HELD_OUT = 40
SETTINGS = [  # place, shrinkage, task variance
    *[("both", 0.3, tau) for tau in (0.0, 1.0)],
    ("end", 0.3, 1.0),
    *[("whole", 0.3, tau) for tau in (0.0, 0.5, 1.0, 2.0)],
    *[("whole", shrinkage, 1.0) for shrinkage in (0.1, 0.6)],
]
DEFAULT = ("whole", 0.3, 1.0)
SHARES = [tenths / 10 for tenths in range(11)]  # of embeddings in joint-discriminant
Read = dict[str, Tensor]  # states [prompts, 2, blocks, d], embeddings [prompts, c], wordings


def main() -> None:
    """Read what isn't there, and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", help="default: those of pool-23.toml")
    parser.add_argument("--prompts", type=int, default=100)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    recipe = (Path(__file__).parent / "pool-23.toml").read_text(encoding="utf-8")
    known = [path.stem for path in (given.data / "train").glob("*.jsonl")]
    tasks = sorted(
        given.tasks.split(",") if given.tasks else [n for n in known if f"/{n}." in recipe]
    )
    base = load_base("smollm2")
    base.model.eval()
    training = [read(base, given, task, "train", "train", given.prompts) for task in tasks]
    asked = [read(base, given, task, "own-new", "validation", HELD_OUT) for task in tasks]
    halves = [left_out(task, each) for task, each in zip(tasks, training, strict=True)]
    tell("development", [one for one, _ in halves], [other for _, other in halves])
    tell("held out", training, asked)


def read(base: Base, given: argparse.Namespace, task: str, folder: str, split: str, n: int) -> Read:
    """What base and embedder make of some prompts of a task, from OUT if it is there."""
    kept = given.out / f"{folder}-{task}-{n}.safetensors"
    if kept.exists():
        found: Read = load_file(kept)
        return found
    lines = (given.data / folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == split]
    random.Random(0).shuffle(rows)
    texts = [row["input"] for row in rows[:n]]
    prompts = [base.tokenizer(text)["input_ids"][-512:] for text in texts]
    found = {
        "states": read_prompts(base.model, prompts, PromptStates(base.model), task),
        "embeddings": embed_texts(texts, DEFAULT_EMBEDDER),
        "wordings": torch.tensor([row["wording"] for row in rows[:n]]),
    }
    save_file(found, kept)
    return found


def interval(apart: list[float]) -> tuple[float, float]:
    """Of a mean over tasks, 95 %, in per cent, by 10,000 draws of tasks."""
    draws = torch.randint(len(apart), (10_000, len(apart)), generator=torch.manual_seed(0))
    found = interval_of(torch.tensor(apart)[draws].mean(dim=1).numpy())
    return 100 * found.low, 100 * found.high


def left_out(task: str, rows: Read) -> tuple[Read, Read]:
    """The rows without one wording, drawn by the task's name, and those of it."""
    wordings = rows["wordings"].unique()
    held = rows["wordings"] == wordings[sum(map(ord, task)) % len(wordings)]
    return {k: v[~held] for k, v in rows.items()}, {k: v[held] for k, v in rows.items()}


def tell(title: str, training: list[Read], asked: list[Read]) -> None:
    """Print the shares of right tasks of all routers."""
    counts = torch.tensor([len(each["wordings"]) for each in asked])
    owners = torch.arange(len(asked)).repeat_interleave(counts)
    states = torch.cat([each["states"] for each in asked])
    vectors = torch.cat([each["embeddings"] for each in asked])

    def right(scores: Tensor) -> str:
        truth = owners.view(-1, *[1] * (scores.dim() - 2))
        return f"{100 * (scores.argmax(-1) == truth).float().mean():.1f}"

    readings = [readings_of(each["states"]) for each in training]
    tables = Tables(
        tuple(map(str, range(len(training)))),
        {f"readings.{k}": torch.stack([r[k] for r in readings]) for k in readings[0]},
    )
    own = [moments_of(each["embeddings"][:, None], dtype=torch.float32) for each in training]
    moments = {part: torch.cat([each[part] for each in own]) for part in PARTS}
    print(f"\n{title}: {len(training)} tasks, n = {len(owners)}")
    print("| | discriminant | each block | embeddings | joint |\n|---|---|---|---|---|")
    for place, shrinkage, variance in SETTINGS:
        how = {"shrinkage": shrinkage, "task_variance": variance, "router": "discriminant"}
        router = PromptDiscriminant(tables, partial(line_of, **how), place, 0.0, 1.0, 1.0)
        blocks = torch.cat([router.scores(some) for some in states.split(100)])
        slopes, offsets = line_of(moments, **how)
        embedded = vectors @ slopes + offsets
        whole = blocks.mean(dim=1)
        cells = [right(each) for each in (whole, blocks, embedded, (whole + embedded) / 2)]
        print(f"| {place}, {shrinkage}, {variance} | {' | '.join(cells)} |")
        if (place, shrinkage, variance) == DEFAULT:
            joint = {share: torch.lerp(whole, embedded, share) for share in SHARES}
    print("| share of embeddings | right | less discriminant |\n|---|---|---|")
    for share, scores in joint.items():
        hits = [(each.argmax(-1) == owners).double() for each in (scores, joint[0.0])]
        apart = [part.mean().item() for part in (hits[0] - hits[1]).split(counts.tolist())]
        low, high = interval(apart)
        print(f"| {share} | {right(scores)} | {100 * fmean(apart):+.1f} [{low:.1f}, {high:.1f}] |")
    rows = torch.cat([each["embeddings"] for each in training])
    their = torch.arange(len(training)).repeat_interleave(
        torch.tensor([len(each["embeddings"]) for each in training])
    )
    nearest = (their[(vectors @ rows.T).argmax(dim=1)] == owners).float().mean()
    centres = normalize(torch.stack([each["embeddings"].mean(dim=0) for each in training]), dim=-1)
    print(f"retrieval {100 * nearest:.1f}, centroid {right(vectors @ centres.T)}")


if __name__ == "__main__":
    main()
