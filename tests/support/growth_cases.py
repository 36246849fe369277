"""Pools of ranks and sites that differ, and models compared in everything that decides."""

import copy
from pathlib import Path

from phatgoose.base import Base
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, save
from tiny import write_expert


def uneven_pool(base: Base, folder: Path) -> Pool:
    """e0 to e3 of ranks 2, 1, 3, 1; e1 acts on queries only, e3 at no query."""
    others = ["k_proj", "v_proj", "down_proj"]
    shapes = (
        {"rank": 2, "target_modules": [*others, "q_proj"]},
        {"rank": 1, "target_modules": ["q_proj"]},
        {"rank": 3},
        {"rank": 1, "target_modules": others},
    )
    pairs = enumerate(shapes)
    return Pool(tuple(write_expert(base, folder, f"e{z}", seed=z, **each) for z, each in pairs))


def composed(router: str, pool: Pool, base: Base):
    return compose(pool, copy.deepcopy(base), router=router)


def assert_is_that_of(folder: Path, router: str, pool: Pool, base: Base) -> None:
    """What was saved and changed is byte for byte what `pool`, composed and saved, is."""
    save(composed(router, pool, base), folder.parent / "new", overwrite=True)
    for name in ("routed.json", "routed.safetensors"):
        assert (folder / name).read_bytes() == (folder.parent / "new" / name).read_bytes()
