"""Rows of datasets from the Hugging Face Hub or from local copies, read by the library `datasets`.

Nothing that is read is ever executed or unpickled: `datasets` runs no scripts from version 4 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ...errors import TaskError
from ...files import first_line
from ..loading import datasets_library
from ..task import Sources

PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own export of datasets that need a script

HINTS = {
    True: "Check the connection and the name, or give a folder with a copy of the files.",
    False: f"Is the copy whole? Of datasets with a script, copy revision {PARQUET_REVISION}.",
}


def read_rows(
    sources: Sources, dataset: str, config: str | None, split: str
) -> Sequence[Mapping[str, Any]]:
    """The rows of one split of the Hub dataset `dataset` ("OWNER/NAME" or "NAME").

    With `sources.data` they come from its copy there, otherwise from the Hub, those of datasets
    that need a script from its parquet export. `config` is a configuration's name, or a folder of
    the repository that `save_to_disk` wrote.

    Rows are read on access (`rows[i]`, or iterate); class labels stay numbers. Raises TaskError for
    a missing library, dataset, configuration or split, and an unreadable file.
    """
    wanted = f"Split {split} of dataset {dataset}"
    wanted += f" (configuration {config})" if config else ""
    library = datasets_library(wanted)
    copy = None if sources.data is None else _copy(sources.data, dataset, wanted)
    try:
        if copy is None and config and "/" in config:
            copy = _download(dataset, config)
        if copy is None:
            loaded = _from_hub(library, dataset, config, split)
        else:
            loaded = _from_copy(library, copy, config, split)
    except Exception as error:  # datasets documents no common base class for what it raises
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise TaskError(
            f"{wanted} can't be loaded from {copy or 'the Hub'}: {reason}. {HINTS[copy is None]}"
        ) from error
    return cast(Sequence[Mapping[str, Any]], loaded.with_format(None))  # plain Python values


def _copy(data: Path, dataset: str, wanted: str) -> Path:
    places = [data / dataset, data / dataset.split("/")[-1]]
    for place in places:
        if place.is_dir():
            return place.absolute()  # a relative one could be taken for a name on the Hub
    raise TaskError(
        f"{wanted} isn't there: wanted a copy of the Hub repository's files in "
        f"{' or '.join(dict.fromkeys(map(str, places)))}. Download it there, for instance with: "
        f"hf download --repo-type dataset {dataset} --local-dir {places[0]}"
    )


def _download(dataset: str, folder: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and needed only here

    return Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=[f"{folder}/*"]))


def _from_hub(library: Any, dataset: str, config: str | None, split: str) -> Any:
    try:
        return library.load_dataset(dataset, config, split=split)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
    # Not by the dataset's name, by which datasets would take it from its cache the next time.
    place = f"hf://datasets/{dataset}@{PARQUET_REVISION}"
    return _exported(library, f"{place}/{config or '*'}/{split}/*.parquet", split)


def _from_copy(library: Any, copy: Path, config: str | None, split: str) -> Any:
    folder, readme = copy / (config or ""), copy / "README.md"
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        saved = library.load_from_disk(str(folder))
        splits = saved if isinstance(saved, library.DatasetDict) else {"train": saved}
        if split not in splits:
            raise LookupError(f"there are {', '.join(splits)}")
        return splits[split]
    if readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8"):
        return library.load_dataset(str(copy), config, split=split)
    export = f"{config or '*'}/{split}/*.parquet"
    if any(copy.glob(export)):
        return _exported(library, f"{copy}/{export}", split)
    return library.load_dataset(str(folder), split=split)


def _exported(library: Any, files: str, split: str) -> Any:
    return library.load_dataset("parquet", data_files={split: files}, split=split)
