"""Whether `phatgoose pool POOL --prompts` names planted faults, and spares pools without any.

    python benchmarks/pool_check.py --hand 2 --prompts 3,5,8,16 --planted 10 --clean 5

Pools of 24 experts of a hand's prompts (people/README.md). Each spoiled pool has one skill's
prompts in two experts, an expert of other skills' prompts, one of general requests, and two prompts
that another expert is for. Limits were chosen on hand 1; hand 3 isn't offered. No base is loaded.
"""

from __future__ import annotations

import argparse
import random
import warnings
from argparse import RawTextHelpFormatter
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from people import drawn
from people_cases import SEED, Hand, load_hand
from phatgoose import reader
from phatgoose.analysis.confusions import SHOWN, Confusions, confusions
from phatgoose.base.identity import BaseReference
from phatgoose.experts.expert import Expert, ExpertInfo
from phatgoose.experts.pool import Pool

SKILLS = 24
Prompts = Mapping[str, Sequence[str]]
Planted = list[tuple[str, set[str], str | None]]  # kind, experts that are to be named, prompt


def pool_of(prompts: Prompts) -> Pool:
    """Experts that have nothing but prompts."""
    read = reader.open_reader()
    experts = []
    for name, texts in prompts.items():
        info = ExpertInfo(name=name, base=BaseReference("none"), adapter_sha256="none")
        expert = Expert(info, Path(), {}, {}, {}).with_prompts_read(read, texts)
        vars(expert)["prompts"] = tuple(texts)
        experts.append(expert)
    return Pool(tuple(experts))


def spoiled(hand: Hand, general: Sequence[str], count: int, draw: int) -> tuple[Prompts, Planted]:
    rng = random.Random(f"{SEED}/spoiled/{count}/{draw}")
    names = rng.sample(list(hand.skills), SKILLS - 3)
    texts = {name: rng.sample(hand.skills[name]["prompts"], 16) for name in names}
    pool = {name: texts[name][:count] for name in names}
    twin, *others = rng.sample(names, len(names))
    half = min(count, 8)
    pool[twin] = texts[twin][:half]
    pool["twin"] = texts[twin][half : 2 * half]
    pool["mixed"] = [texts[name][-1] for name in others[:count]]
    pool["general"] = rng.sample(list(general), count)
    planted: Planted = [("twins", {twin, "twin"}, None)]
    planted += [("thief", {"mixed"}, None), ("general", {"general"}, None)]
    for place in (16, 18):
        name, owner = others[place : place + 2]
        row = rng.randrange(count)
        pool[name] = [*pool[name][:row], texts[owner][-2], *pool[name][row + 1 :]]
        planted.append(("mislabelled", {name}, texts[owner][-2]))
    items = list(pool.items())
    rng.shuffle(items)
    return dict(items), planted


def is_named(checked: Confusions, kind: str, experts: set[str], prompt: str | None) -> bool:
    for finding in checked.findings:
        if kind == "twins" == finding.kind and set(finding.experts) == experts:
            return True
        is_first = finding.experts[0] in experts
        if (
            kind in ("thief", "general")
            and is_first
            and finding.kind in ("stray", "thief", "orphan")
        ):
            return True
        is_mislabelled = kind == finding.kind == "mislabelled" and is_first
        if is_mislabelled and repr((prompt or "")[:SHOWN]) in finding.message:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--hand", type=int, default=2, choices=(1, 2))
    parser.add_argument("--prompts", default="3,5,8")
    parser.add_argument("--planted", type=int, default=10)
    parser.add_argument("--clean", type=int, default=5)
    parser.add_argument("--states", type=Path, help="Keep what the reader makes of texts here.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    remember(given.states)
    hand = load_hand(given.hand)
    general = load_hand(2).texts["general"]
    for count in map(int, given.prompts.split(",")):
        named, all_of = Counter[str](), Counter[str]()
        for draw in range(100, 100 + given.planted):
            prompts, planted = spoiled(hand, general, count, draw)
            checked = confusions(pool_of(prompts))
            for kind, experts, prompt in planted:
                all_of[kind] += 1
                named[kind] += is_named(checked, kind, experts, prompt)
        alarms = Counter[str]()
        for draw in range(100, 100 + given.clean):
            checked = confusions(pool_of(drawn(hand, SKILLS, count, draw)))
            alarms.update(finding.kind for finding in checked.findings)
        shares = ", ".join(f"{kind} {named[kind]}/{all_of[kind]}" for kind in all_of)
        print(
            f"{count} prompts: named {named.total()}/{all_of.total()} ({shares}); false alarms in "
            f"{given.clean} pools: {alarms.total()} {dict(alarms)}",
            flush=True,
        )


def remember(path: Path | None) -> None:
    """Each text is read once."""
    states = reader.Reader.states
    seen: dict[str, Tensor] = torch.load(path) if path and path.exists() else {}

    def remembered(self: reader.Reader, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in seen]
        if new:
            seen.update(zip(new, states(self, new), strict=True))
        return torch.stack([seen[text] for text in texts])

    reader.Reader.states = remembered  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
