"""Saved models made of pools larger than memory, and changed without being rewritten.

Adding writes one more file, of the new experts only; removing writes none. Either takes effect when
the description is replaced: a process that is killed before has changed nothing (a file that it may
leave behind belongs to no model, and goes when the folder is compacted).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers import PreTrainedModel

from ...base.fingerprint import dtype_name
from ...base.loading import Base
from ...config import Routing
from ...errors import ConfigError, RoutingError
from ...experts.pool import Pool, check_alike
from ...files.atomic import (
    bring_back,
    clear_left_overs,
    new_directory,
    require_free,
    temporary_file,
    write_text,
)
from ...files.strict import reason
from ...files.tensor_file import TensorFile, is_finite, write_tensors
from ..checks import check_numbers
from ..compose import check_acting, prepare, routed_layers
from ..growing import check_growth, check_removal
from ..routers.prompt_router import ByPrompt, check_tables
from ..routers.router import Scores, router_of
from ..stacks import declared, stack_of
from .save import describe, is_encoder_decoder, layer_tensors, write_card
from .tensors import (
    ROUTED_INFO,
    ROUTED_WEIGHTS,
    SEGMENT_FILE,
    SavedModel,
    described_by,
    in_segments,
    lookup_in,
    quantised,
    read_saved,
    shareable,
    version_of,
)

STORED: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
HEADER_OF_A_TENSOR = 200  # bytes beside its name, at most
TENSORS_OF_A_SITE = 20
LOCK = ".lock"


def save_pool(
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
) -> SavedModel:
    """What `save(compose(pool, …), directory)` writes, without the pool ever being in memory.

    Sites are stacked and written one by one, and read when used (`load` maps the file), so the pool
    may be larger than memory. `stored` is the type of the experts' factors in the file, one of
    STORED: None is that of the base, which loses nothing. Returns it as `read_saved` does.

    Raises what `compose` and `save` do, and ConfigError for an unknown type.
    """
    target = Path(directory)
    if not overwrite:
        require_free(target, RoutingError)
    kind = _stored(stored)
    prepared = prepare(pool, base, routing, scores=scores, keep=keep, leave_out=leave_out)
    pool, parts = prepared.pool, prepared.parts

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from _indices(pool)
        yield from (parts.prompt_router.tables.saved() if parts.prompt_router else {}).items()
        for layer in routed_layers(prepared):
            yield from _as_stored(layer_tensors(layer), kind)

    with new_directory(target, RoutingError, overwrite=overwrite) as work:
        write_tensors(work / ROUTED_WEIGHTS, tensors(), _header(pool.sites))
        describe(prepared.model, parts, work)
    return read_saved(target)


def add_to_saved(directory: str | Path, pool: Pool | str | Path) -> SavedModel:
    """The saved model in `directory` with the experts of `pool` too, after its own.

    They are stored as the others are. Raises what `growing.add_experts` does; ExpertError when one
    doesn't fit the stacks that are there, RoutingError when the folder is damaged, can't be
    written, or another process is changing it.
    """
    pool = Pool.open(pool)
    with _changing(Path(directory)) as folder:
        saved = read_saved(folder)
        router, first = router_of(saved.routing), saved.segments[0].tensors
        check_growth(router, saved.records, pool, saved.base, folded=_has_folded(saved))
        check_alike(pool.experts, *_sizes_at_sites(saved))
        check_acting(pool, is_encoder_decoder=is_encoder_decoder(folder))
        rows: dict[str, Tensor] = {}
        if isinstance(router, ByPrompt):
            embedder = saved.info.get("lookup", {}).get("embedder")
            rows = router.tables(pool, embedder=embedder).saved()
        check_tables(lookup_in(first), lookup_in(rows))
        kind = torch.int8 if _kind_of(first) == torch.int8 else None
        types = _Types(first)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from _indices(pool)
            yield from rows.items()
            for site in pool.sites:
                # In float32 first, so that numbers are rounded once.
                stack = stack_of(pool, site, torch.float32, torch.device("cpu"))
                check_numbers(stack, site, pool.names)
                made = {**stack.tensors(), **router.state_at(pool, site)}
                held = {f"{n}.{site}": _in_type(made[n], types.of(n, site)) for n in made}
                yield from _as_stored(held, kind)
                pool.release()

        segment = _write_segment(folder, tensors(), _header(pool.sites), len(pool))
        experts = [*saved.info["experts"], *shareable(pool.records())]
        try:
            segments = [*_segments(saved), segment]
            return _describe(folder, saved, segments=segments, experts=experts)
        except RoutingError:
            if segment not in _segments(saved):
                (folder / segment["file"]).unlink()
            raise


def remove_from_saved(directory: str | Path, names: Iterable[str]) -> SavedModel:
    """The saved model in `directory` without the experts of these `names`.

    Their rows stay in its files, unused, until `compact`. Raises what `growing.remove_experts`
    does, and RoutingError as `add_to_saved`.
    """
    with _changing(Path(directory)) as folder:
        saved = read_saved(folder)
        router, folded = router_of(saved.routing), _has_folded(saved)
        left = check_removal(router, saved.names, names, folded=folded)
        stay = {saved.left[z] for z in left}
        gone = [z for z in range(len(saved.info["experts"])) if z not in stay]
        return _describe(folder, saved, segments=_segments(saved), removed=gone)


def compact(directory: str | Path, *, stored: str | None = None) -> SavedModel:
    """The saved model in `directory` in one file again, of the experts that are left only.

    `stored` is the type of the experts' factors from now on, None the one they have.
    Stacks are joined and written site by site. Raises RoutingError as `add_to_saved`, ConfigError
    for an unknown type.
    """
    wanted = _stored(stored)
    with _changing(Path(directory)) as folder:
        saved = read_saved(folder)
        held = saved.tensors
        is_int8 = _kind_of(saved.segments[0].tensors) == torch.int8
        kind = wanted or (torch.int8 if is_int8 else None)
        small = [name for name in held if name.startswith(("experts.", "lookup."))]

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from ((name, held[name]) for name in small)
            for name in held:
                if name not in small:
                    yield from _as_stored({name: held[name]}, kind)
                    for segment in saved.segments:
                        segment.tensors.release()

        segment = _write_segment(folder, tensors(), _header(saved.sites), len(saved.left))
        found = _describe(folder, saved, segments=[segment], experts=saved.records, removed=[])
        known = {entry["file"] for entry in _segments(found)}
        for path in folder.iterdir():
            if SEGMENT_FILE.fullmatch(path.name) and path.name not in known:
                path.unlink()
        return found


@contextmanager
def _changing(folder: Path) -> Iterator[Path]:
    bring_back(folder)
    if not (folder / ROUTED_INFO).is_file():
        raise RoutingError(f"{folder} holds no routed model: {ROUTED_INFO} can't be read.")
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            yield folder
    except Timeout as error:
        raise RoutingError(f"Another process is changing {folder}.") from error
    except OSError as error:
        raise RoutingError(f"{folder} can't be written: {reason(error)}.") from error


def _write_segment(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], header: int, experts: int
) -> dict[str, Any]:
    clear_left_overs(folder / ROUTED_WEIGHTS)
    with temporary_file(folder / ROUTED_WEIGHTS) as unfinished:
        write_tensors(unfinished, tensors, header)
        sha256 = TensorFile(unfinished).sha256()
        file = f"routed-{sha256[:12]}.safetensors"
        # Named by its content: no description names it yet, so a kill here leaves a file of no
        # model.
        os.replace(unfinished, folder / file)
    return {"file": file, "sha256": sha256, "experts": experts}


def _describe(folder: Path, saved: SavedModel, **changes: Any) -> SavedModel:
    info = {key: value for key, value in saved.info.items() if key != "weights_sha256"}
    content = {**info, **changes}
    content["format_version"] = version_of(content["experts"], 2)
    # Read back as untrusted input first: an inconsistent description is never written.
    found = described_by(content, folder)
    write_card(folder, content)  # before the description, so that what fails here changes nothing
    write_text(folder / ROUTED_INFO, json.dumps(content, indent=2) + "\n", RoutingError)
    return found


def _segments(saved: SavedModel) -> list[dict[str, Any]]:
    if in_segments(saved.info):
        return list(saved.info["segments"])
    count, sha256 = len(saved.info["experts"]), saved.info["weights_sha256"]
    return [{"file": ROUTED_WEIGHTS, "sha256": sha256, "experts": count}]


def _indices(pool: Pool) -> Iterator[tuple[str, Tensor]]:
    for site in pool.sites:
        acting = [z for z, expert in enumerate(pool.experts) if site in expert.modules]
        yield f"experts.{site}", torch.tensor(acting)


def _as_stored(
    tensors: Mapping[str, Tensor], kind: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        part, _, site = name.partition(".")
        if kind is None or not _is_factor(part):
            yield name, tensor
        elif kind == torch.int8:
            yield from quantised(part, site, tensor)
        else:
            stored = tensor.to(kind)
            if not is_finite(stored):
                raise RoutingError(
                    f"{part} at {site} has numbers that {dtype_name(kind)} can't hold; store the "
                    f"experts in bfloat16 or float32."
                )
            yield name, stored


class _Types:
    """The types of a file's tensors, which differ from site to site where a base's layers do."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._known = {name: tensor.dtype for name, tensor in tensors.items()}
        self._factors: dict[str, torch.dtype] = {}  # by site, by layer name, and of any at ""
        for name, kind in list(self._known.items()):
            part, _, site = name.partition(".")
            self._known |= {f"{part} at {_layer(site)}": kind, part: kind}
            if _is_factor(part):
                self._factors |= {site: kind, _layer(site): kind}
                self._factors.setdefault("", kind)

    def of(self, name: str, site: str) -> torch.dtype | None:
        """The type of `name` at `site`, else at one called alike, else anywhere; None if unknown.

        All factors of a site have one type.
        """
        if _is_factor(name):
            places, known = (site, _layer(site), ""), self._factors
        else:
            places, known = (f"{name}.{site}", f"{name} at {_layer(site)}", name), self._known
        return next((known[each] for each in places if each in known), None)


def _layer(site: str) -> str:
    return site.rpartition(".")[2]


def _in_type(tensor: Tensor, kind: torch.dtype | None) -> Tensor:
    """`tensor` in the type of those that are there; int8 is made later, with its scales."""
    is_kept = kind is None or kind == torch.int8 or not tensor.is_floating_point()
    return tensor if is_kept else tensor.to(kind)


def _has_folded(saved: SavedModel) -> bool:
    return any(name.startswith("folded.") for name in saved.segments[0].tensors)


def _sizes_at_sites(saved: SavedModel) -> tuple[dict[str, int], dict[str, int]]:
    inputs, outputs = {}, {}
    sizes = {name: held.sizes for name, held in declared().tensors.items()} | {"vectors": "En"}
    for segment in saved.segments:
        for name, tensor in segment.tensors.items():
            part, _, site = name.partition(".")
            last = sizes.get(part, " ")[-1]
            if last == "n":
                inputs[site] = tensor.shape[-1]
            elif last == "d":
                outputs[site] = tensor.shape[-1]
    return inputs, outputs


def _kind_of(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    held = (tensors[name].dtype for name in tensors if _is_factor(name.partition(".")[0]))
    return next(held, None)


def _is_factor(name: str) -> bool:
    held = declared().tensors.get(name)
    return held is not None and held.dtype == "factor"


def _stored(name: str | None) -> torch.dtype | None:
    if name is not None and name not in STORED:
        raise ConfigError(f"Experts can be stored in {', '.join(STORED)}, not in {name!r}.")
    return None if name is None else STORED[name]


def _header(sites: Iterable[str]) -> int:
    return sum(TENSORS_OF_A_SITE * (len(site) + HEADER_OF_A_TENSOR) for site in sites) + 4096
