"""JSON of strangers: read strictly, or refused in one line."""

from __future__ import annotations

import pytest

from phatgoose.errors import ExpertError
from phatgoose.files.strict import read_json_object


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "wanted an object"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, reason):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ExpertError, match=reason):
        read_json_object(tmp_path / "a.json")
