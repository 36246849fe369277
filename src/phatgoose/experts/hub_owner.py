"""A pool from the Hub: what of an owner's repositories can be routed on one base, and fetching it.

Listing reads names, sizes and the small JSON files that describe adapters and experts, nothing
else; weights come with `import_listed`, which checks them like any import.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from ..base import published
from ..errors import PhatgooseError, PoolError
from ..files import MOST_JSON_BYTES, one_line, shortened
from .expert import (
    LAYOUT,
    adapter_file_names,
    adapter_files,
    check_name,
    expert_files,
    formats,
    read_info,
)
from .hub import PREFIX, HubReference, pull, without_progress_bars
from .importing import import_adapter, imported_kind, plain_config, require_named_base
from .peft_files import PICKLED_WEIGHTS

MOST_REPOSITORIES = 1000  # of an owner, those that the Hub names first
MOST_BYTES = 2 * 2**30  # of an adapter; a larger one is imported by its own name
OWNER = re.compile(r"hub:(?P<owner>[\w.-]+)/(?P<names>[\w.*?-]*[*?][\w.*?-]*)")


def descriptions() -> tuple[str, ...]:
    return (LAYOUT.info, *(files.config for files in formats()))


@dataclass(frozen=True)
class Found:
    """An expert or adapter on the Hub, pinned to a commit.

    `kind` is a key of `kinds` and `base` the id of its base, each None where it isn't known; `size`
    counts the bytes of its files. `refusal` says why it can't be routed, None where it can.
    """

    reference: HubReference
    is_expert: bool
    size: int
    kind: str | None = None
    base: str | None = None
    refusal: str | None = None

    @property
    def place(self) -> str:
        return str(replace(self.reference, revision=None)).removeprefix(PREFIX)

    @property
    def name(self) -> str:
        return self.place.partition("/")[2].replace("/", "--")


@dataclass(frozen=True)
class Listing:
    """What an owner has: `found` in order, and the number of `others`, which hold no adapter.

    `base` is the one that most of the adapters have that can be routed, or the one asked for; None
    where there is none. `is_whole` is False where the owner has more than MOST_REPOSITORIES.
    """

    pattern: str
    base: str | None
    found: tuple[Found, ...]
    others: int
    is_whole: bool = True

    @property
    def routable(self) -> tuple[Found, ...]:
        return tuple(each for each in self.found if each.refusal is None)


def is_owner(place: str | Path) -> bool:
    return OWNER.fullmatch(str(place)) is not None


def list_owner(pattern: str, base: str | None = None) -> Listing:
    """What the repositories that `pattern` (`hub:OWNER/*`) names hold, and what can be routed.

    `base` None takes the base that most have. Raises PoolError when the Hub can't be asked.
    """
    asked = OWNER.fullmatch(pattern)
    if asked is None:
        raise PoolError(f"{shortened(pattern)} names no owner's repositories; wanted hub:OWNER/*.")
    with without_progress_bars():
        try:
            api = HfApi()
            listed = api.list_models(author=asked["owner"], full=True, limit=MOST_REPOSITORIES + 1)
            models = sorted(listed, key=lambda model: model.id)
        except Exception as error:  # no common base class, see `hub`
            why = one_line(error).removesuffix(".")
            raise PoolError(f"{pattern} can't be listed: {why}.") from error
        is_whole = len(models) <= MOST_REPOSITORIES
        named = [
            model
            for model in models[:MOST_REPOSITORIES]
            if fnmatchcase(model.id.partition("/")[2], asked["names"])
        ]
        found = [each for model in named for each in _in_repository(model)]
    base = base or _commonest(found)
    others = len({model.id for model in named} - {each.reference.repo for each in found})
    matched = tuple(_on_base(each, base) for each in found)
    return Listing(pattern, base, matched, others, is_whole)


def import_listed(listing: Listing, out: str | Path) -> Listing:
    """`listing` with its routable experts fetched to `out`, or with the reason where that failed.

    What is in `out` under a name stays. Raises PoolError when nothing could be fetched.
    """
    folder = Path(out)
    fetched = tuple(
        each if each.refusal else replace(each, refusal=_import(each, folder))
        for each in listing.found
    )
    result = replace(listing, found=fetched)
    if not result.routable:
        reason = next(
            (
                each.refusal
                for each, before in zip(fetched, listing.found, strict=True)
                if before.refusal is None
            ),
            "there is nothing that can be routed",
        )
        raise PoolError(f"Nothing of {listing.pattern} was imported: {reason}")
    return result


def _import(found: Found, folder: Path) -> str | None:
    target = folder / found.name
    if target.exists():
        return None
    try:
        if found.is_expert:
            pull(found.reference, target)
        else:
            import_adapter(str(found.reference), target)
    except PhatgooseError as error:
        return one_line(error)
    return None


def _in_repository(model: Any) -> Iterator[Found]:
    folders: dict[str, set[str]] = {}
    for sibling in model.siblings or ():
        path = PurePosixPath(sibling.rfilename)
        if len(path.parts) <= 2:
            folders.setdefault(str(path.parent), set()).add(path.name)
    holding = [name for name in sorted(folders) if folders[name] & set(descriptions())]
    holding = ["."] if "." in holding else holding
    sizes = _sizes(model) if holding else {}
    for name in holding:
        inside = "" if name == "." else name
        try:
            reference = HubReference.parse(f"{model.id}/{inside}".rstrip("/"))
        except PhatgooseError:  # a hidden folder, or a name that is none
            continue
        yield _examined(replace(reference, revision=model.sha), folders[name], sizes)


def _sizes(model: Any) -> dict[str, int]:
    try:
        told = HfApi().model_info(model.id, revision=model.sha, files_metadata=True)
    except Exception:  # no common base class, see `hub`
        return {}
    return {each.rfilename: each.size for each in told.siblings or () if each.size is not None}


def _examined(reference: HubReference, files: set[str], sizes: Mapping[str, int]) -> Found:
    inside = f"{reference.folder}/" if reference.folder else ""
    held = {name: sizes.get(inside + name) for name in files}
    has_weights = any(n.endswith(".safetensors") and n in files for n in adapter_file_names())
    found = Found(reference, LAYOUT.info in files, _fetched_bytes(inside, sizes))
    described = [name for name in descriptions() if name in files]
    unknown = [name for name in expert_files() if name in files and held[name] is None]
    large = [name for name in described if (held[name] or 0) > MOST_JSON_BYTES]
    if not has_weights:
        pickled = f"its weights are pickled ({PICKLED_WEIGHTS}), which is never read"
        return replace(found, refusal=pickled if PICKLED_WEIGHTS in files else "it has no weights")
    if unknown:
        return replace(found, refusal=f"the Hub doesn't say how large {unknown[0]} is")
    if large:
        return replace(found, refusal=f"its {large[0]} is larger than {MOST_JSON_BYTES >> 20} MiB")
    if found.size > MOST_BYTES:
        most = MOST_BYTES >> 30
        return replace(found, refusal=f"its files are larger than {most} GiB; import it by name")
    return _described(found, [inside + name for name in described])


def _fetched_bytes(inside: str, sizes: Mapping[str, int]) -> int:
    paths = (PurePosixPath(path.removeprefix(inside)) for path in sizes if path.startswith(inside))
    fetched = {1: expert_files(), 2: (LAYOUT.info,)}  # by depth; see `hub.pull`
    return sum(
        sizes[f"{inside}{path}"] for path in paths if path.name in fetched.get(len(path.parts), ())
    )


def _described(found: Found, descriptions: list[str]) -> Found:
    reference = found.reference
    try:
        snapshot = snapshot_download(
            reference.repo, revision=reference.revision, allow_patterns=descriptions
        )
    except Exception as error:  # no common base class, see `hub`
        return replace(found, refusal=f"it can't be fetched: {one_line(error)}")
    folder = Path(snapshot) / reference.folder
    try:
        check_name(found.name)
        files = adapter_files(folder)
        config = plain_config(folder)
        found = replace(found, kind=imported_kind(files, config))
        named = config.get(files.base_key)
        if found.is_expert:
            named = read_info(folder / LAYOUT.info).base.id
            if os.path.exists(named):  # by a path that is one here, too
                return replace(found, base=named)
        known = published(require_named_base(named, from_hub=True))
        return replace(found, base=known.id if known else None)
    except PhatgooseError as error:
        text = str(error).replace(f"{folder}/", "").replace(str(folder), "it")
        return replace(found, refusal=one_line(text))


def _commonest(found: list[Found]) -> str | None:
    counts = Counter(each.base for each in found if each.refusal is None and each.base)
    return min(counts, key=lambda base: (-counts[base], base), default=None)


def _on_base(found: Found, base: str | None) -> Found:
    if found.refusal is not None or found.base == base:
        return found
    return replace(found, refusal=f"its base is {shortened(found.base)}")
