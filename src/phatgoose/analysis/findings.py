"""What checks find, of an analysis, an audit, or a pool's example prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong: `kind` for programs, `message` for people, whom it is about."""

    kind: str
    message: str
    experts: tuple[str, ...] = ()
