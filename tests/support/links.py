"""What must survive beside our own files."""

from pathlib import Path

KEPT = "what somebody else has written"


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
