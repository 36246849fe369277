"""What bounds on single contributions change in honest pools, and with a masking attacker.

    python benchmarks/bounds.py [--folder audit] [--experts 100]

Fresh prompts of each honest expert's own task (`honest_experts.py`), and of the same task in other
words (a later expert's), are routed by discriminant and joint-discriminant with bounds
(`routing/routers/bounds.py`) and without. A line for each: the share that goes to the right expert,
the share whose expert the bounds change, and what the attacker wins of the others' prompts.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm.auto import tqdm

from attackers import ATTACKS, attacked
from honest_experts import MAKERS, POOL, SKILLS, fresh_prompts, honest_pools, small_base
from phatgoose.base.loading import load_base
from phatgoose.config import Routing
from phatgoose.experts.pool import Pool
from phatgoose.experts.readings import PromptStates, moments_of
from phatgoose.routing.routers import discriminant
from phatgoose.routing.routers.router import router_of
from phatgoose.tasks.embeddings import embed_texts, prompt_texts
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.prompt_passes import read_prompts

PROMPTS = 20  # of each expert
TASKS = len(MAKERS) + len(SKILLS)  # so many experts on, the task is the same again


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("audit"))
    parser.add_argument("--experts", type=int, default=100)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pools = [Pool.open(places) for places in honest_pools(asked.folder, asked.experts)]
    read = prompts_of(asked.folder, asked.experts)
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for first, pool in enumerate(tqdm(pools, disable=None)):
        masked = attacked(pool, first % POOL, ATTACKS["masking covariance"], first, 1)
        for words, ahead in (("own words", 0), ("other words", TASKS)):
            numbers = [(POOL * first + z + ahead) % asked.experts for z in range(len(pool))]
            asked_of = [read[number] for number in numbers]
            for name, each, attacker in (("honest", pool, -1), ("masked", masked, first % POOL)):
                for router, shares in compared(each, asked_of, attacker).items():
                    rows[f"{name}, {words}, {router}"].append(shares)
    print("right without bounds, right with, expert changed, attacker wins without, with")
    for name, found in rows.items():
        mean = torch.stack(found).mean(dim=0)
        print(f"{name}: {', '.join(f'{share:.3f}' for share in mean.tolist())}")


def prompts_of(folder: Path, experts: int) -> list[tuple[Tensor, Tensor]]:
    """The states and embeddings of each expert's fresh prompts."""
    base = load_base(small_base(folder / "base"), dtype="float32")
    encoder, found = Encoder.for_model(base.model, base.tokenizer), []
    for number in tqdm(range(experts), desc="prompts", disable=None):
        examples = fresh_prompts(number, PROMPTS)
        prompts = [pair.prompt for pair in encoder.pairs(examples)]
        states = read_prompts(base.model, prompts, PromptStates(base.model))
        found.append((states, embed_texts(prompt_texts(base.tokenizer, prompts))))
    return found


def compared(pool: Pool, asked: list[tuple[Tensor, Tensor]], attacker: int) -> dict[str, Tensor]:
    """By router: the five shares of the printed line. The attacker's own prompts are left out."""
    owners = torch.cat(
        [torch.full((len(s),), z) for z, (s, _) in enumerate(asked) if z != attacker]
    )
    found = {}
    with without_bounds():
        before = chosen(pool, asked, attacker)
    for name, now in chosen(pool, asked, attacker).items():
        then = before[name]
        hits = [then == owners, now == owners, then != now, then == attacker, now == attacker]
        found[name] = torch.stack([hit.double().mean() for hit in hits])
    return found


def chosen(pool: Pool, asked: list[tuple[Tensor, Tensor]], attacker: int) -> dict[str, Tensor]:
    """The expert of each prompt, by router."""
    router = router_of(Routing("discriminant"))
    reader = router.discriminant(router.tables(pool))
    own = [moments_of(e.embeddings[:, None], dtype=torch.float32) for e in pool.experts]
    moments = {part: torch.cat([each[part] for each in own]) for part in own[0]}
    slopes, offsets = router.line(moments)
    kept = [each for z, each in enumerate(asked) if z != attacker]
    read = torch.cat([reader.scores(states[:, :, reader.blocks]) for states, _ in kept])
    embedded = torch.cat([vectors for _, vectors in kept]) @ slopes + offsets
    both = (read + embedded) / 2
    return {"discriminant": read.argmax(dim=1), "joint-discriminant": both.argmax(dim=1)}


@contextmanager
def without_bounds() -> Iterator[None]:
    """The discriminant as it was before there were bounds."""
    with (
        patch.object(discriminant, "bounded_means", lambda means, least: means),
        patch.object(discriminant, "bounded_variances", lambda _, factor, rest: (factor, rest)),
        patch.object(discriminant, "bound_of", lambda values: torch.tensor(torch.inf)),
    ):
        yield


if __name__ == "__main__":
    main()
