"""Text that no UTF-8 can hold: half of a character."""

from __future__ import annotations

__all__ = ["half_character"]


def half_character(text: str) -> str | None:
    """The first character of `text` that UTF-8 can't encode, None where it can encode all.

    JSON may hold one where a text was cut within an emoji; Python makes one of a byte in an
    argument or a file's name that is not UTF-8. No tokenizer reads it and no file takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None
