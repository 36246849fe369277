"""What `phatgoose audit` finds: planted attackers, and false alarms on honest experts.

    python benchmarks/audit.py [--folder audit] [--experts 110] [--out audit.json]

Makes honest experts (`honest_experts.py`, some 10 s each) in pools of ten, and plants each kind of
attacker (`attackers.py`) in each pool, at three strengths. The limits in `phatgoose.analysis.audit`
were set by the pools of CALIBRATED alone, whose largest signs of honest experts are printed beside
them; what counts is the other pools. Experts and pools that are finished are kept in the folder;
delete its `found` to measure again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from attackers import ATTACKS, HARMLESS, attacked
from honest_experts import honest_pools, small_base
from phatgoose.analysis.audit import (
    LIMITS,
    Audit,
    NeutralText,
    neutral_signs,
    read_neutral_text,
    report_of,
)
from phatgoose.analysis.audit_signs import signs_of
from phatgoose.base import Base, load_base
from phatgoose.evaluation.intervals import wilson_interval
from phatgoose.experts.pool import Pool
from phatgoose.sites import find_sites

CALIBRATED = (0, 2, 4, 6, 8)  # pools that limits were set by
STRENGTHS = (0, 1, 2)
Record = Mapping[str, Any]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("audit"))
    parser.add_argument("--experts", type=int, default=110)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pools = honest_pools(asked.folder, asked.experts)
    base = load_base(small_base(asked.folder / "base"), dtype="float32")
    text = read_neutral_text(base, list(find_sites(base.model)))
    records = [
        recorded(asked.folder, number, places, base, text)
        for number, places in enumerate(tqdm(pools, desc="pools", disable=None))
    ]
    kept = [record for number, record in enumerate(records) if number not in CALIBRATED]
    known = [record for number, record in enumerate(records) if number in CALIBRATED]
    found = {"reported": summary(kept), "limits were set by": summary(known)}
    print(json.dumps(found, indent=2))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=2) + "\n")


def recorded(
    folder: Path, number: int, places: Sequence[Path], base: Base, text: NeutralText
) -> Record:
    """The record of one pool, from the folder where it is there."""
    path = folder / "found" / f"{number:02}.json"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(measured(number, Pool.open(places), base, text), indent=1))
    content: Record = json.loads(path.read_text())
    return content


def measured(number: int, pool: Pool, base: Base, text: NeutralText) -> Record:
    """Who is accused in `pool`, in its halves, and with an attacker of each kind and strength."""
    plain = look(pool, base, text)
    halves = [Pool(pool.experts[:5]), Pool(pool.experts[5:])]
    planted = []
    for kind, (name, attack) in enumerate({**ATTACKS, **HARMLESS}.items()):
        for strength in STRENGTHS:
            z = (3 * kind + strength + number) % len(pool)
            changed = attacked(pool, z, attack, number, strength)
            accused = look(changed, base, text).unusual
            others = set(accused) - set(plain.unusual) - {pool.names[z]}
            planted.append(
                {
                    "kind": name,
                    "strength": strength,
                    "found": pool.names[z] in accused,
                    "others accused": len(others),
                }
            )
    return {
        "experts": len(pool),
        "accused": list(plain.unusual),
        "accused in fives": [name for half in halves for name in look(half, base, text).unusual],
        "findings": [finding.message for finding in plain.findings],
        "largest": {n: max(v for v in plain.signs[n] if v is not None) for n in LIMITS},
        "planted": planted,
    }


def summary(records: Sequence[Record]) -> Record:
    """Shares over the pools of `records`, with Wilson's 95 % intervals."""
    experts = sum(record["experts"] for record in records)
    planted = [each for record in records for each in record["planted"]]
    harmful = [each for each in planted if each["kind"] in ATTACKS]
    by_kind = {kind: [e for e in planted if e["kind"] == kind] for kind in (*ATTACKS, *HARMLESS)}
    by_strength = {str(s): [e for e in harmful if e["strength"] == s] for s in STRENGTHS}
    alarms = {key: sum(len(record[key]) for record in records) for key in
              ("accused", "accused in fives")}  # fmt: skip
    return {
        "attackers found": found_of(harmful),
        "by kind": {kind: found_of(each) for kind, each in by_kind.items()},
        "by strength": {strength: found_of(each) for strength, each in by_strength.items()},
        "false alarms, pools of ten": share(alarms["accused"], experts),
        "false alarms, pools of five": share(alarms["accused in fives"], experts),
        "others accused beside an attacker": share(
            sum(each["others accused"] for each in planted), 9 * len(planted)
        ),
        "largest sign of an honest expert": {
            name: [max(record["largest"][name] for record in records), LIMITS[name].most]
            for name in LIMITS
        },
        "alarms": [message for record in records for message in record["findings"]],
    }


def found_of(planted: Iterable[Record]) -> Record:
    """How many of these attackers were found."""
    found = [each["found"] for each in planted]
    return share(sum(found), len(found))


def share(hits: int, of: int) -> Record:
    """So many of so many, with an interval."""
    interval = wilson_interval(hits, of)
    low, high = round(interval.low, 4), round(interval.high, 4)
    return {"hits": hits, "of": of, "share": round(hits / of, 4), "interval": [low, high]}


def look(pool: Pool, base: Base, text: NeutralText) -> Audit:
    """The audit of `pool`, by neutral text that was read before."""
    return report_of(pool, {**signs_of(pool), **neutral_signs(pool, base, text)})


if __name__ == "__main__":
    main()
