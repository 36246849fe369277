"""Packed models made of pools larger than memory, and changed without being written anew.

Adding writes one more file, of the new experts only; removing writes none. Either counts from the
moment in which the description is replaced: a process that is killed before that has done nothing
(the file that it may leave behind is nobody's, and goes when the folder is compacted).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers import PreTrainedModel

from ...base.fingerprint import check_base
from ...base.loading import Base
from ...config import Routing
from ...errors import ConfigError, ExpertError, RoutingError
from ...experts.pool import Pool
from ...files.atomic import new_directory, write_text
from ...files.left_overs import clear_left_overs, temporary_file
from ...files.tensor_file import TensorFile, write_tensors
from ..compose import prepare, routed_layers
from ..growing import check_growth, check_removal
from ..routers.registry import embeddings_of, router_vectors
from ..routers.scores import Scores
from ..stacks.site_stack import stack_of
from .description import ROUTED_INFO, ROUTED_WEIGHTS, routing_record
from .load import check_router_of
from .save import layer_tensors, lookup_info, lookup_tensors
from .tensors import EMBEDDINGS, FACTORS, OWNERS, Packed, quantised, read_packed

__all__ = ["STORED", "add_to_packed", "compact", "pack", "remove_from_packed"]

STORED: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
HEADER_OF_A_TENSOR = 200  # bytes beside its name, at most
TENSORS_OF_A_SITE = 20
# The side of a site's layer whose size each tensor's last dimension tells.
SIDES = {
    **{"A": "inputs", "vectors": "inputs", "input_deltas": "inputs"},
    **{"B": "outputs", "output_deltas": "outputs", "down": "outputs"},
}
LOCK = ".lock"


def pack(
    pool: Pool | str | Path,
    directory: str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    routing: Routing | None = None,
    scores: Scores | str | Path | None = None,
    keep: Iterable[str] | None = None,
    leave_out: Iterable[str] | None = None,
    stored: str | None = None,
    overwrite: bool = False,
) -> Packed:
    """What `save(compose(pool, …), directory)` writes, without the pool ever being in memory.

    Sites are stacked and written one by one, and read when used (`load` maps the file), so the pool
    may be larger than memory. `stored` is the type of the experts' factors in the file, one of
    STORED: None is that of the base, which loses nothing. Returns it as `read_packed` does.

    Raises what `compose` and `save` do, and ConfigError for an unknown type.
    """
    target = Path(directory)
    if target.exists() and not overwrite:
        raise RoutingError(f"{target} exists already; choose another place or allow overwriting.")
    kind = _stored(stored)
    prepared = prepare(
        pool, base, routing or Routing(), scores=scores, keep=keep, leave_out=leave_out
    )
    pool = prepared.pool

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from _indices(pool)
        yield from lookup_tensors(prepared.lookup).items()
        for layer in routed_layers(prepared):
            yield from _as_stored(layer_tensors(layer), kind)

    with new_directory(target, RoutingError, overwrite=overwrite) as work:
        write_tensors(work / ROUTED_WEIGHTS, tensors(), _header(pool.sites))
        info = {
            "format_version": 1,
            "base": asdict(prepared.base.reference),
            "routing": routing_record(prepared.routing),
            "experts": pool.records(),
            "weights_sha256": TensorFile(work / ROUTED_WEIGHTS).sha256(),
            "lookup": lookup_info(prepared.lookup),
        }
        (work / ROUTED_INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return read_packed(target)


def add_to_packed(directory: str | Path, pool: Pool | str | Path) -> Packed:
    """The packed model in `directory` with the experts of `pool` too, after its own.

    They are stored as the others are. Raises what `growing.add_experts` does; ExpertError when one
    doesn't fit the stacks that are there, RoutingError when the folder is damaged, can't be
    written, or another process is changing it.
    """
    pool = pool if isinstance(pool, Pool) else Pool.open(pool)
    with _changing(Path(directory)) as folder:
        packed = read_packed(folder)
        routing, first = packed.routing, packed.segments[0].tensors
        check_router_of(packed)
        check_growth(routing, packed.names, pool)
        _check_unfolded(packed)
        check_base(pool.base, packed.base)
        _check_sizes(packed, pool)
        kind = _kind_of(first)
        vectors_kind = next((t.dtype for n, t in first.items() if n.startswith("vectors.")), None)
        computed = kind if kind not in (None, torch.int8) else torch.float32

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from _indices(pool)
            yield from _embeddings(packed, pool)
            for site in pool.sites:
                held = stack_of(pool, site, computed, torch.device("cpu")).tensors()
                held = {f"{name}.{site}": tensor for name, tensor in held.items()}
                vectors = router_vectors(pool, site, routing)
                if vectors is not None:
                    held[f"vectors.{site}"] = vectors.to(vectors_kind)
                yield from _as_stored(held, kind)
                pool.release()

        segment = _write_segment(folder, tensors(), _header(pool.sites), len(pool))
        _describe(
            folder,
            packed,
            segments=[*_segments(packed), segment],
            experts=[*packed.info["experts"], *pool.records()],
        )
        return read_packed(folder)


def remove_from_packed(directory: str | Path, names: Iterable[str]) -> Packed:
    """The packed model in `directory` without the experts of these `names`.

    Their rows stay in its files, unused, until `compact`. Raises what `growing.remove_experts`
    does, and RoutingError as `add_to_packed`.
    """
    with _changing(Path(directory)) as folder:
        packed = read_packed(folder)
        left = check_removal(packed.routing, packed.names, names)
        _check_unfolded(packed)
        stay = {packed.left[z] for z in left}
        gone = [z for z in range(len(packed.info["experts"])) if z not in stay]
        _describe(folder, packed, segments=_segments(packed), removed=gone)
        return read_packed(folder)


def compact(directory: str | Path, *, stored: str | None = None) -> Packed:
    """The packed model in `directory` in one file again, of the experts that are left only.

    `stored` is the type of the experts' factors from now on (see `pack`), None the one they have.
    Stacks are joined and written site by site. Raises RoutingError as `add_to_packed`, ConfigError
    for an unknown type.
    """
    wanted = _stored(stored)
    with _changing(Path(directory)) as folder:
        packed = read_packed(folder)
        held = packed.tensors
        kind = wanted or _kind_of(packed.segments[0].tensors)
        small = [name for name in held if name.startswith(("experts.", "lookup."))]

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from ((name, held[name]) for name in small)
            for name in held:
                if name not in small:
                    yield from _as_stored({name: held[name]}, kind)
                    for segment in packed.segments:
                        segment.tensors.release()

        segment = _write_segment(folder, tensors(), _header(packed.sites), len(packed.left))
        _describe(folder, packed, segments=[segment], experts=packed.records, removed=[])
        found = read_packed(folder)
        known = {entry["file"] for entry in _segments(found)}
        for path in folder.iterdir():
            if path.suffix == ".safetensors" and path.name not in known:
                path.unlink()
        return found


@contextmanager
def _changing(folder: Path) -> Iterator[Path]:
    """`folder`, which no other process changes meanwhile; what can't be written is told."""
    if not (folder / ROUTED_INFO).is_file():
        raise RoutingError(f"{folder} holds no routed model: {ROUTED_INFO} can't be read.")
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            yield folder
    except Timeout as error:
        raise RoutingError(f"Another process is changing {folder}.") from error
    except OSError as error:
        raise RoutingError(f"{folder} can't be written: {error.strerror or error}.") from error


def _write_segment(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], header: int, experts: int
) -> dict[str, Any]:
    """The description's entry of a segment, which is in its place then and nobody's yet."""
    clear_left_overs(folder / ROUTED_WEIGHTS)
    with temporary_file(folder / ROUTED_WEIGHTS) as unfinished:
        write_tensors(unfinished, tensors, header)
        sha256 = TensorFile(unfinished).sha256()
        file = f"routed-{sha256[:12]}.safetensors"
        os.replace(unfinished, folder / file)
    return {"file": file, "sha256": sha256, "experts": experts}


def _describe(folder: Path, packed: Packed, **changes: Any) -> None:
    info = {key: value for key, value in packed.info.items() if key != "weights_sha256"}
    content = {**info, "format_version": 2, **changes}
    write_text(folder / ROUTED_INFO, json.dumps(content, indent=2) + "\n", RoutingError)


def _segments(packed: Packed) -> list[dict[str, Any]]:
    if packed.info["format_version"] > 1:
        return list(packed.info["segments"])
    count, sha256 = len(packed.info["experts"]), packed.info["weights_sha256"]
    return [{"file": ROUTED_WEIGHTS, "sha256": sha256, "experts": count}]


def _indices(pool: Pool) -> Iterator[tuple[str, Tensor]]:
    for site in pool.sites:
        acting = [z for z, expert in enumerate(pool.experts) if site in expert.modules]
        yield f"experts.{site}", torch.tensor(acting)


def _as_stored(
    tensors: Mapping[str, Tensor], kind: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """`tensors` with factors in the type `kind`; None leaves them as they are."""
    for name, tensor in tensors.items():
        part, _, site = name.partition(".")
        if part not in FACTORS or kind is None:
            yield name, tensor
        elif kind == torch.int8:
            yield from quantised(part, site, tensor)
        else:
            yield name, tensor.to(kind)


def _embeddings(packed: Packed, pool: Pool) -> Iterator[tuple[str, Tensor]]:
    """The embeddings of the experts of `pool`, where the router looks inputs up by them."""
    embedder = packed.info.get("lookup", {}).get("embedder")
    if embedder is None:
        return
    found = embeddings_of(pool, embedder)
    yield EMBEDDINGS, found.rows
    yield OWNERS, found.owners


def _check_unfolded(packed: Packed) -> None:
    if any(name.startswith("folded.") for name in packed.segments[0].tensors):
        raise RoutingError(
            "The merged experts are folded into the base's weights and can't be told apart any "
            "more; compose the pool anew."
        )


def _check_sizes(packed: Packed, pool: Pool) -> None:
    """Raise ExpertError unless the experts of `pool` map what those that are there map."""
    sizes: dict[str, dict[str, int]] = {"inputs": {}, "outputs": {}}
    for segment in packed.segments:
        for name, tensor in segment.tensors.items():
            part, _, site = name.partition(".")
            if part in SIDES:
                sizes[SIDES[part]][site] = tensor.shape[-1]
    for expert in pool.experts:
        for site, module in expert.modules.items():
            known = tuple(sizes[side].get(site) for side in sizes)
            got = (module.in_features or known[0], module.out_features or known[1])
            if any(k not in (None, g) for g, k in zip(got, known, strict=True)):
                raise ExpertError(
                    f"Expert {expert.name!r}, site {site}: maps {got[0]} to {got[1]} features, the "
                    f"experts that are there {known[0]} to {known[1]}."
                )


def _kind_of(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """The type that the factors of a segment are stored in, None where it has none."""
    held = (tensors[name].dtype for name in tensors if name.partition(".")[0] in FACTORS)
    return next(held, None)


def _stored(name: str | None) -> torch.dtype | None:
    if name is not None and name not in STORED:
        raise ConfigError(f"Experts can be stored in {', '.join(STORED)}, not in {name!r}.")
    return None if name is None else STORED[name]


def _header(sites: Iterable[str]) -> int:
    return sum(TENSORS_OF_A_SITE * (len(site) + HEADER_OF_A_TENSOR) for site in sites) + 4096
