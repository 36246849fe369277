"""Tokens in the colours of their experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.text import Text

__all__ = ["COLOURS", "coloured", "expert_style"]

# Paul Tol's "bright" colours: colour-blind readers can tell them apart, and so can terminals of 16
# colours, where each of them falls on another one.
COLOURS = ("#EE6677", "#4477AA", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")


def coloured(tokens: Iterable[tuple[str, int | None, bool]], labels: Mapping[int, str]) -> Text:
    """Tokens (text, expert or None, bold) in their experts' colours, with a legend of `labels`."""
    text = Text()
    for token, expert, is_bold in tokens:
        style = "" if expert is None else expert_style(expert)
        text.append(token, style=style + (" bold" if is_bold else ""))
    text.append("\n\n")
    for expert, label in labels.items():
        text.append(f" {label} ", style=f"reverse {expert_style(expert)}")
        text.append(" ")
    return text


def expert_style(expert: int) -> str:
    """The colour of an expert; after seven they start again, underlined."""
    return COLOURS[expert % len(COLOURS)] + (" underline" if expert >= len(COLOURS) else "")
