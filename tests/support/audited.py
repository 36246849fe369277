"""What Python does while a context is open, by its audit events: for tests that nothing else is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WATCHED = {
    "open",
    "exec",
    "compile",
    "import",
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "socket.connect",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "shutil.rmtree",
}
seen: list[tuple[str, tuple[Any, ...]]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if seen is not None and event in WATCHED:
        seen.append((event, arguments))


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The audited events of this process while the context is open."""
    global seen
    seen = found = []
    try:
        yield found
    finally:
        seen = None


def unexpected(events: list[tuple[str, tuple[Any, ...]]], folder: Path) -> list[Any]:
    """The events that are no opening of a file of `folder` for reading."""
    odd = []
    for event, arguments in events:
        path, mode = (arguments[0], arguments[1]) if event == "open" else (None, None)
        inside = isinstance(path, str) and Path(path).resolve().is_relative_to(folder.resolve())
        if not (event == "open" and inside and (mode is None or "r" in str(mode))):
            odd.append((event, arguments))
    return odd
