"""The kind of expert that docs/extending.md works out, known while a test wants it."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mixed_experts import MAKERS, make_kind
from paths import ROOT
from phatgoose.base.identity import Base
from phatgoose.experts import KINDS
from phatgoose.experts.pool import Pool
from phatgoose.sites import find_sites

DOCUMENT = ROOT / "docs" / "extending.md"


def code_of_the_kind() -> str:
    text = DOCUMENT.read_text(encoding="utf-8").partition("## A kind of expert")[2]
    return re.search(r"<!-- runs -->\n```python\n(.*?)^```", text, re.M | re.S).group(1)


def _defined() -> SimpleNamespace:
    names: dict[str, object] = {"__name__": "shifts"}
    exec(compile(code_of_the_kind(), str(DOCUMENT), "exec", dont_inherit=True), names)
    return SimpleNamespace(**names, kind=KINDS.pop("shift"))


SHIFTS = _defined()


def make_shift(base: Base, folder: Path, *, seed: int = 0) -> Path:
    """An adapter of random vectors at every site."""
    generator = torch.Generator().manual_seed(seed)
    shifts = {
        name: SHIFTS.ShiftModule(torch.randn(site.out_features, generator=generator))
        for name, site in find_sites(base.model).items()
    }
    folder.mkdir(parents=True)
    return SHIFTS.ShiftModule.write(folder, shifts, {"base": base.id})


def register(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Make the kind known until the test ends, its stack with other class attributes."""
    part = type("Stack", (SHIFTS.ShiftStack,), changes)
    monkeypatch.setitem(KINDS, "shift", replace(SHIFTS.kind, parts=(part,)))
    monkeypatch.setitem(MAKERS, "shift", make_shift)


def pool_with_shifts(pool: Pool, base: Base, folder: Path) -> Pool:
    """`pool` with the shifts "shift8" and "shift9"; the kind must be known."""
    shifts = (make_kind("shift", base, folder, seed=seed) for seed in (8, 9))
    return Pool((*pool.experts, *shifts))
