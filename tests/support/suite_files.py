"""A suite of one's own in a TOML file."""

from __future__ import annotations

from pathlib import Path


def write(folder: Path, text: str) -> Path:
    path = folder / "suite.toml"
    path.write_text(text, encoding="utf-8")
    return path


FULL = """
name = "my-suite"
suffix = "\\nAnswer:"

[[tasks]]
file = "mine/b.jsonl"
name = "questions"
metrics = ["accuracy", "rouge-l"]
max_new_tokens = 8

[[tasks]]
file = "mine/a.csv"
suffix = ""
"""
