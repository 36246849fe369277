"""Rows of datasets from the Hugging Face Hub, or from local copies of their repositories.

Files are found here and read by the `datasets` library, so that a copy may hold only a part of a
repository. Nothing that is read is ever executed or unpickled.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ...errors import TaskError
from ...files.strict import first_line, parse_yaml
from ..loading import datasets_library
from ..task import Sources

PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own export of datasets that need a script
NEEDS_A_SCRIPT = re.compile(r"\bscripts?\b|trust_remote_code")  # in errors of `datasets`
SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?$")
# File names that mean a split when none equals its name, as in `datasets`.
ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# The first of these formats that is present is read; `datasets` has a reader for each.
FORMATS = {
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "json": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv",),
}
HEADER = re.compile(r"\s*---[ \t]*\n(.*?)\n---[ \t]*$", re.DOTALL | re.MULTILINE)
OWN_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def read_rows(
    sources: Sources, dataset: str, config: str | None, split: str
) -> Sequence[Mapping[str, Any]]:
    """The rows of one split of the Hub dataset `dataset` ("OWNER/NAME" or "NAME").

    With `sources.data` they come from its copy there: files that the README's `configs` declare or
    that are named after configuration and split, or what `Dataset.save_to_disk` wrote. Otherwise
    from the Hub, those of datasets that need a script from its parquet export. `config` is a
    configuration's name, or a folder of the repository.

    Rows are read on access (`rows[i]`, or iterate); class labels stay numbers. Raises TaskError for
    a missing library, dataset, configuration or split, and an unreadable file.
    """
    request = _Request(dataset, config, split)
    if sources.data is not None:
        return _read_folder(_local_copy(sources.data, request), request)
    library = datasets_library(request)
    if config is not None and "/" in config:
        return _read_folder(_download(request, "main", [f"{config}/*"]), request)
    try:
        return _rows(library.load_dataset(dataset, config, split=split))
    except Exception as error:  # datasets documents no common base class for what it raises
        if NEEDS_A_SCRIPT.search(str(error)):
            folders = (config, "default") if config else ("*",)
            patterns = [f"{folder}/*{split}/*.parquet" for folder in folders]
            return _read_folder(_download(request, PARQUET_REVISION, patterns), request)
        raise TaskError(
            f"{request} can't be loaded from the Hub: {first_line(error)}. Check the connection "
            f"and the name, or give a folder with a copy of the dataset's files."
        ) from error


@dataclass(frozen=True)
class _Request:
    dataset: str
    config: str | None
    split: str

    def __str__(self) -> str:
        config = f" (configuration {self.config})" if self.config else ""
        return f"Split {self.split} of dataset {self.dataset}{config}"


def _rows(loaded: Any) -> Sequence[Mapping[str, Any]]:
    """A `Dataset` whose rows are plain Python values, whatever format it was saved with."""
    return cast(Sequence[Mapping[str, Any]], loaded.with_format(None))


def _local_copy(data: Path, request: _Request) -> Path:
    places = [data / request.dataset, data / request.dataset.split("/")[-1]]
    for place in places:
        if place.is_dir():
            return place
    wanted = " or ".join(dict.fromkeys(map(str, places)))
    raise TaskError(
        f"{request} isn't there: wanted a copy of the Hub repository's files in {wanted}. "
        f"Download it there, for instance with: hf download --repo-type dataset {request.dataset} "
        f"--local-dir {places[0]}"
    )


def _download(request: _Request, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and needed only here

    try:
        folder = snapshot_download(
            request.dataset, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    except Exception as error:  # what the Hub, the network and the disk may raise
        raise TaskError(
            f"{request} can't be downloaded from the Hub (revision {revision}): "
            f"{first_line(error)}. Check the connection and the name, or give a folder with a copy "
            f"of the files."
        ) from error
    if not any(path.is_file() for path in Path(folder).rglob("*")):
        raise TaskError(
            f"{request} isn't on the Hub: revision {revision} of {request.dataset} has no file "
            f"{' or '.join(patterns)}."
        )
    return Path(folder)


def _read_folder(root: Path, request: _Request) -> Sequence[Mapping[str, Any]]:
    library = datasets_library(request)
    saved = _saved_dataset(root / (request.config or ""), request)
    if saved is not None:
        try:
            return _rows(library.Dataset.load_from_disk(str(saved)))
        except Exception as error:
            raise TaskError(f"{request}: {saved} can't be read: {first_line(error)}.") from error
    files = _files(root, request)
    for kind, endings in FORMATS.items():
        chosen = sorted(str(file) for file in files if file.suffix in endings)
        if chosen:
            return _read_files(library, kind, chosen, request)
    raise TaskError(
        f"{request}: wanted parquet, arrow, jsonl or csv files in {root}, got "
        f"{', '.join(sorted(file.name for file in files)[:3])}."
    )


def _read_files(
    library: Any, kind: str, files: list[str], request: _Request
) -> Sequence[Mapping[str, Any]]:
    try:
        if kind == "arrow":
            parts = [library.Dataset.from_file(file) for file in files]
            return _rows(library.concatenate_datasets(parts))
        escaped = [glob.escape(file) for file in files]  # datasets treats names as patterns
        return _rows(getattr(library.Dataset, f"from_{kind}")(escaped))
    except Exception as error:  # readers raise their own errors, which wrap pyarrow's
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        where = files[0] if len(files) == 1 else f"one of {files[0]} to {files[-1]}"
        raise TaskError(
            f"{request}: {where} can't be read: {reason}. Is the file complete?"
        ) from error


def _saved_dataset(folder: Path, request: _Request) -> Path | None:
    if (folder / "dataset_dict.json").is_file():
        parts = {path.parent.name: path.parent for path in folder.glob("*/state.json")}
    elif (folder / "state.json").is_file():  # one Dataset without splits
        parts = {"train": folder}
    else:
        return None
    if request.split not in parts:
        raise _missing_split(request, folder, set(parts))
    return parts[request.split]


def _files(root: Path, request: _Request) -> list[Path]:
    declared = _declared_configs(root, request)
    name = request.config or _default_of(declared)
    if name is not None and name in declared:
        return _declared_files(root, declared[name], request)
    if request.config is None:
        return _named_files(root, request)
    places = [root / request.config, root / "default"]  # the Hub's export renames a single one
    folders = [place for place in places if place.is_dir()]
    folders += [root] if request.config == "default" else []
    if not folders:
        known = set(declared) or {path.name for path in root.iterdir() if path.is_dir()}
        raise TaskError(
            f"{request}: {root} has no configuration {request.config}; "
            f"it has {', '.join(sorted(known)) or 'none'}."
        )
    return _named_files(folders[0], request)


def _declared_configs(root: Path, request: _Request) -> Mapping[str, Mapping[str, Any]]:
    readme = root / "README.md"
    if not readme.is_file():
        return {}
    try:
        return _header_configs(readme, readme.stat().st_mtime_ns)
    except Exception as error:  # broken YAML, or something other than configs
        raise TaskError(
            f"{request}: the header of {readme} can't be read: {first_line(error)}."
        ) from error


# `modified` is a part of the cache's key only.
@lru_cache(maxsize=8)  # with hundreds of configurations it takes seconds
def _header_configs(readme: Path, modified: int) -> Mapping[str, Mapping[str, Any]]:
    header = HEADER.match(readme.read_text(encoding="utf-8-sig"))
    fields = (header and parse_yaml(header[1])) or {}
    return {str(config["config_name"]): config for config in fields.get("configs") or []}


def _default_of(declared: Mapping[str, Mapping[str, Any]]) -> str | None:
    marked = [name for name, config in declared.items() if config.get("default")]
    if marked or "default" in declared:
        return [*marked, "default"][0]
    return next(iter(declared)) if len(declared) == 1 else None


def _declared_files(root: Path, config: Mapping[str, Any], request: _Request) -> list[Path]:
    data_files = config.get("data_files")
    if data_files is None:
        return _named_files(root / str(config.get("data_dir") or "."), request)
    patterns: dict[str, list[str]] = {}
    for item in data_files if isinstance(data_files, list) else [data_files]:
        part = item if isinstance(item, dict) else {"split": "train", "path": item}
        paths = part.get("path") or []
        paths = paths if isinstance(paths, list) else [paths]
        patterns.setdefault(str(part.get("split", "train")), []).extend(map(str, paths))
    if request.split not in patterns:
        raise _missing_split(request, root, set(patterns))
    folder = root / str(config.get("data_dir") or ".")
    found: list[Path] = []
    for pattern in patterns[request.split]:
        if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
            raise TaskError(f"{request}: {root / 'README.md'} names {pattern}, outside its folder.")
        found += [path for path in folder.glob(pattern) if path.is_file()]
    if not found:
        wanted = ", ".join(patterns[request.split])
        raise TaskError(
            f"{request}: {folder} has no file {wanted}, which its README.md declares. "
            f"Download it from the Hub's repository {request.dataset}."
        )
    return found


def _named_files(folder: Path, request: _Request) -> list[Path]:
    endings = {ending for kind in FORMATS.values() for ending in kind}
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in endings and path.name not in OWN_FILES and path.is_file()
    ]
    groups = _groups(folder, files, lambda name: name == request.split)
    if not groups and request.split in ALIASES:
        word = re.compile(
            rf"(?<![a-z])({'|'.join(ALIASES[request.split])})(?![a-z])", re.IGNORECASE
        )
        groups = _groups(folder, files, lambda name: word.search(name) is not None)
    if len(groups) > 1 and "default" in groups:
        groups = {"default": groups["default"]}
    if len(groups) > 1:
        raise TaskError(
            f"{request}: {folder} has several configurations, and none is the default; "
            f"name one of {', '.join(sorted(groups))}."
        )
    if groups:
        return next(iter(groups.values()))
    words = re.compile(
        "|".join(word for words in ALIASES.values() for word in words), re.IGNORECASE
    )
    unnamed = not any(words.search(str(path.relative_to(folder))) for path in files)
    if files and unnamed and request.split == "train":
        return files
    raise _missing_split(request, folder, {str(path.relative_to(folder)) for path in files})


def _groups(folder: Path, files: list[Path], fits: Callable[[str], bool]) -> dict[str, list[Path]]:
    """The files with a fitting name, by the path above that name: a configuration, or ""."""
    groups: dict[str, list[Path]] = {}
    for path in files:
        relative = path.relative_to(folder)
        names = [*relative.parts[:-1], SHARD.sub("", relative.stem)]
        for depth, name in enumerate(names):
            if fits(name):
                groups.setdefault("/".join(names[:depth]), []).append(path)
                break
    return groups


def _missing_split(request: _Request, folder: Path, there: set[str]) -> TaskError:
    if there:
        return TaskError(f"{request} isn't in {folder}; there are {', '.join(sorted(there)[:8])}.")
    return TaskError(
        f"{request} isn't in {folder}: wanted parquet, arrow, jsonl or csv files, got none. Copy "
        f"the Hub repository's files there; if they are a script, those of its revision "
        f"{PARQUET_REVISION}."
    )
