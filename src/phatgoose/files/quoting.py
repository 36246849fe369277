"""Other people's words in our error messages: short, printable, on one line."""

from __future__ import annotations

__all__ = ["first_line", "one_line", "reason", "shortened"]


def one_line(text: object, most: int = 300) -> str:
    """`text` as one printable line of at most `most` characters.

    Errors of other libraries, for instance, may hold names from the files that they failed to read.
    """
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return line if len(line) <= most else f"{line[:most]}…"


def shortened(value: object, most: int = 80) -> str:
    """The `repr` of `value`, as one line of at most `most` characters."""
    return one_line(repr(value), most)


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or its type where it says nothing."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])


def reason(problem: Exception) -> str:
    """Why a file can't be read or written, in the system's words."""
    return str(getattr(problem, "strerror", None) or problem)
