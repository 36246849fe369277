"""Single ranks in place of whole experts, as HiLoRA (2510.12266) routes them, by routers we have.

    python research/single_ranks.py SUITE OUT.jsonl LIMIT ROUTER EXPERTS…

Each LoRA becomes as many experts as it has ranks: one row of A with its column of B. ROUTER (such
as spectr or seqr) chooses among them for every token, RANKS of all experts' (`all`), or HALF of
those of the task's own expert (`own half`). The weights of what is chosen sum to its number, so all
ranks of one expert would be that expert. HiLoRA itself first shortlists experts by the prompt.
Printed are means over tasks, and shares of the own experts' mean with intervals over tasks.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from kept import kept, read
from tqdm.auto import tqdm

from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.lora import LoraFactors
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.open_model import loaded_base
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Sources

RANKS, HALF = 16, 8


def main(suite: str, out: str, limit: str, router: str, *places: str) -> None:
    """Score every task of the suite that an expert was trained on."""
    pool, path = Pool.open(places), Path(out)
    base = loaded_base(pool)
    records = read(path) if path.is_file() else {}
    entries = [each for each in open_suite(suite).entries if each.name in pool.names]
    with tempfile.TemporaryDirectory() as work:
        every = split(pool, pool.names, Path(work) / "all", RANKS)
        for entry in tqdm([each for each in entries if each.name not in records], unit="task"):
            own = split(pool, [entry.name], Path(work) / entry.name, HALF)
            rows = {"own": (pool, f"single:expert={entry.name}", None)}
            rows |= {"all": (every, router, RANKS), "own half": (own, router, HALF)}
            record: dict[str, object] = {"task": entry.name}
            task = entry.read(Sources())
            for label, (some, chosen, k) in rows.items():
                model = compose(some, base, router=chosen, k=k)
                (score,) = evaluate(model, task, limit=int(limit), tokenizer=base.tokenizer).scores
                detach(model)
                record |= {label: score.score, "n": score.n}
            records[entry.name] = record
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    tell(list(records.values()))


def split(pool: Pool, names: Iterable[str], folder: Path, chosen: int) -> Pool:
    """The ranks of these experts as experts; means of `chosen` of them are these ranks' sum."""
    for name in names:
        loras = pool[name].lora
        for rank in range(next(iter(loras.values())).A.shape[0]):
            place = folder / f"{name}-{rank:02}"
            place.mkdir(parents=True)
            single = {
                site: LoraFactors(
                    lora.A[rank : rank + 1], lora.B[:, rank : rank + 1], lora.scale * chosen
                )
                for site, lora in loras.items()
            }
            about = {"base_model_name_or_path": pool.base.id, "task_type": "CAUSAL_LM"}
            LoraFactors.write(place, single, about)
    return Pool.open(folder)


def tell(records: list[dict[str, float]]) -> None:
    """Print the table."""
    own = np.array([record["own"] for record in records])
    print(f"{len(records)} tasks, n = {sum(record['n'] for record in records)}")
    for label in ("own", "all", "own half"):
        scores = np.array([record[label] for record in records])
        share, low, high = kept(scores, own)
        print(f"| {label} | {100 * scores.mean():.1f} | {share:.0f} % [{low:.0f}, {high:.0f}] |")


if __name__ == "__main__":
    main(*sys.argv[1:])
