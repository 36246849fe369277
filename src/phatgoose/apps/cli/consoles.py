"""Text of others on the user's terminal."""

from __future__ import annotations

__all__ = ["plain"]


def plain(text: str) -> str:
    """`text` for rich to print as it stands, on one line.

    No markup, no control characters, and names of files that are no UTF-8 as escapes.
    """
    line = " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").split())
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return shown.replace("[", r"\[")
