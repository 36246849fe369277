"""Pools of ranks and sites that differ, and models compared in everything that decides."""

import copy
import warnings
from pathlib import Path

from phatgoose.base import Base
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, save
from routed_models import with_embeddings
from tiny import write_expert

EMBEDDED = ("retrieval", "centroid")
NAMES = ("e0", "e1", "e2", "e3")


def uneven_pool(base: Base, folder: Path) -> Pool:
    """e0 to e3 of ranks 2, 1, 3, 1; e1 acts on queries only, e3 at no query."""
    others = ["k_proj", "v_proj", "down_proj"]
    return Pool(
        (
            write_expert(base, folder, "e0", seed=0, rank=2, target_modules=[*others, "q_proj"]),
            write_expert(base, folder, "e1", seed=1, rank=1, target_modules=["q_proj"]),
            write_expert(base, folder, "e2", seed=2, rank=3),
            write_expert(base, folder, "e3", seed=3, rank=1, target_modules=others),
        )
    )


def composed(router: str, pool: Pool, base: Base, **options: object):
    given = {"router": router, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a k that is lowered
        pool = with_embeddings(pool) if router in EMBEDDED else pool
        return compose(pool, copy.deepcopy(base), **given)


def assert_is_that_of(folder: Path, router: str, pool: Pool, base: Base) -> None:
    """What was saved and changed is byte for byte what `pool`, composed and saved, is."""
    save(composed(router, pool, base), folder.parent / "new", overwrite=True)
    for name in ("routed.json", "routed.safetensors", "README.md"):
        assert (folder / name).read_bytes() == (folder.parent / "new" / name).read_bytes()
