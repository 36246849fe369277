"""Experts that join and leave a saved model, without its base.

The folder is written anew beside the old one, which it replaces in one step: a process that is
killed before has changed nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...errors import RoutingError
from ...experts.pool import Pool, check_alike
from ...files import new_directory, sha256_of, write_text
from ..checks import check_numbers
from ..compose import check_acting
from ..growing import check_growth, check_removal
from ..routers.prompt_router import ByPrompt, Tables
from ..stacks import SitePart, grown_parts, kept_part, renumbered, stack_of
from .save import is_encoder_decoder, write_card
from .tensors import (
    ROUTED_INFO,
    ROUTED_WEIGHTS,
    SavedModel,
    read_description,
    read_saved,
    shareable,
)


def add_to_saved(directory: str | Path, pool: Pool | str | Path) -> SavedModel:
    """The saved model in `directory` with the experts of `pool` too, after its own.

    Raises what `growing.add_experts` does; ExpertError when one doesn't fit the stacks that are
    there, RoutingError when the folder is damaged, can't be written, or changed meanwhile.
    """
    pool, folder = Pool.open(pool), Path(directory).resolve()  # a link stays
    saved = read_saved(folder)
    router, tables = saved.router, saved.tables
    check_growth(router, saved.records, pool, saved.base, folded=_has_folded(saved))
    sizes = [{s: each[x] for s, each in saved.sizes.items() if x in each} for x in "nd"]
    check_alike(pool.experts, *sizes)
    check_acting(pool, is_encoder_decoder=is_encoder_decoder(folder))
    if isinstance(router, ByPrompt):
        tables = tables.grown(router.tables(pool, embedder=tables.info.get("embedder")))
    old, new = {site: saved.at(site) for site in saved.sites}, {}
    for site in pool.sites:
        # Without a stack to go by, float32: the base rounds it when it is loaded.
        dtype = old[site].stack.dtype if site in old else torch.float32
        stack = stack_of(pool, site, dtype, torch.device("cpu"))
        check_numbers(stack, site, pool.names)
        new[site] = SitePart(stack, router.state_at(pool, site))
    joined = grown_parts(old, new, len(saved.names))
    return _rewritten(folder, saved, joined, tables, [*saved.records, *pool.records()])


def remove_from_saved(directory: str | Path, names: Iterable[str]) -> SavedModel:
    """The saved model in `directory` without the experts of these `names`.

    Raises what `growing.remove_experts` does, and RoutingError as `add_to_saved`.
    """
    folder = Path(directory).resolve()
    saved = read_saved(folder)
    left = check_removal(saved.router, saved.names, names, folded=_has_folded(saved))
    place = renumbered(torch.tensor(left), len(saved.names))
    kept = {site: kept_part(saved.at(site), place) for site in saved.sites}
    sites = {site: part for site, part in kept.items() if part}
    records = [saved.records[z] for z in left]
    return _rewritten(folder, saved, sites, saved.tables.shrunk(place), records)


def _has_folded(saved: SavedModel) -> bool:
    return any(name.startswith("folded.") for name in saved.tensors)


def _rewritten(
    folder: Path,
    saved: SavedModel,
    sites: Mapping[str, SitePart],
    tables: Tables,
    records: list[dict[str, Any]],
) -> SavedModel:
    tensors = tables.saved()
    for site, part in sites.items():
        held = {"experts": part.stack.experts, **part.stack.tensors(), **part.state}
        tensors |= {f"{name}.{site}": tensor for name, tensor in held.items()}
    with new_directory(folder, RoutingError, overwrite=True) as work:
        shutil.copytree(
            folder,
            work,
            symlinks=True,
            ignore=lambda place, _: [ROUTED_WEIGHTS] if place == str(folder) else [],
            dirs_exist_ok=True,
        )
        save_file({name: t.contiguous() for name, t in tensors.items()}, work / ROUTED_WEIGHTS)
        sha256 = sha256_of(work / ROUTED_WEIGHTS)
        info = {**saved.info, "experts": shareable(records), "weights_sha256": sha256}
        write_card(work, info)
        write_text(work / ROUTED_INFO, json.dumps(info, indent=2) + "\n", RoutingError)
        found = read_saved(work)
        if read_description(folder / ROUTED_INFO) != saved.info:
            raise RoutingError(f"Another process has changed {folder} meanwhile; try again.")
    found.tensors.path = folder / ROUTED_WEIGHTS
    return found
