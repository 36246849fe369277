"""Files that are valid and yet odd, and the one line that refuses them."""

import json
from pathlib import Path

import pytest

from phatgoose.errors import PhatgooseError


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
