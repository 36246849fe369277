"""`phatgoose.json`: what an expert directory says of itself (docs/format.md)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any

from ..base.fingerprint import BaseReference
from ..errors import ExpertError
from ..files.quoting import one_line, shortened
from ..files.strict_json import read_json_object

__all__ = ["FORMAT_VERSION", "NAME", "ExpertInfo", "check_name", "info_json", "read_info"]

FORMAT_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LONGEST_NAME = 200  # of new ones; names of temporary files beside an expert are longer
OPTIONAL = (str, NoneType)
TYPES: dict[str, Any] = {  # of every field but the version
    "name": str,
    "base.id": str,
    "base.revision": OPTIONAL,
    "base.fingerprint": OPTIONAL,
    "adapter_sha256": str,
    "vectors_sha256": OPTIONAL,
    "embeddings_sha256": OPTIONAL,
    "embedder": OPTIONAL,
    "embedding_form": OPTIONAL,
    "task": dict,
    "hyperparameters": dict,
    "metrics": dict,
}


@dataclass(frozen=True)
class ExpertInfo:
    """What `phatgoose.json` says. `task`, `hyperparameters` and `metrics` are free-form records.

    `embedding_form` says what `embedder` embedded (`tasks.embeddings.TEXTS`). None for experts made
    before it was recorded: theirs is the paper's.
    """

    name: str
    base: BaseReference
    adapter_sha256: str
    vectors_sha256: str | None = None
    embeddings_sha256: str | None = None
    format_version: int = FORMAT_VERSION
    task: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    embedder: str | None = None
    embedding_form: str | None = None


def check_name(name: str) -> None:
    """Raise ExpertError unless `name` can be a new expert's (docs/format.md)."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise ExpertError(
            f"{shortened(name)} can't name an expert: use letters, digits, '.', '_' and '-' only, "
            f"at most {LONGEST_NAME}, and begin with a letter or digit."
        )


def read_info(path: Path) -> ExpertInfo:
    """What the `phatgoose.json` at `path` says.

    Raises ExpertError when it is missing, damaged, of another version, or a field has a wrong type.
    """
    try:
        content = read_json_object(path)
        if content.get("format_version") != FORMAT_VERSION:
            raise ExpertError(
                f"{path}: format version {shortened(content.get('format_version'))} is unknown; "
                f"this phatgoose reads version {FORMAT_VERSION}."
            )
        info = ExpertInfo(**{**content, "base": BaseReference(**content["base"])})
    except FileNotFoundError as error:
        holds = next(path.parent.glob(f"*/{path.name}"), None)
        hint = f" It holds experts: name each ({holds.parent}, …)." if holds else ""
        raise ExpertError(
            f"{path.parent} is no expert directory: {path.name} is missing.{hint}"
        ) from error
    except (TypeError, KeyError) as error:
        raise ExpertError(
            f"{path} is not a valid description of an expert: {one_line(error)}."
        ) from error
    for key, wanted in TYPES.items():
        value = attrgetter(key)(info)
        if not isinstance(value, wanted) or (isinstance(value, str) and not value.isprintable()):
            raise ExpertError(f"{path}: {key} is {shortened(value)}, which it can't be.")
    return info


def info_json(info: ExpertInfo) -> str:
    """The content of `phatgoose.json`, with null for numbers that JSON lacks (a loss of NaN)."""
    content = _without_nan(asdict(info))
    if info.embedding_form is None:
        del content["embedding_form"]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
