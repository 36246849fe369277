"""Files that are valid and yet odd, what must survive beside them, and the one line of refusals."""

import json
from pathlib import Path

import pytest

from phatgoose.errors import PhatgooseError

KEPT = "what somebody else has written"


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def one_line_of(action, error: type[PhatgooseError] = PhatgooseError) -> str:
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
