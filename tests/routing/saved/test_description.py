"""What a routed model's folder says of it."""

from __future__ import annotations

import json

import pytest

from phatgoose.errors import RoutingError
from phatgoose.routing.saved.load import load


def edit_info(folder, change):
    path = folder / "routed.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 1}'])
def test_a_damaged_description_is_told(saved, content):
    (saved / "routed.json").write_text(content)
    with pytest.raises(RoutingError, match=r"routed\.json"):
        load(saved)


@pytest.mark.parametrize("key", ["base", "routing", "experts", "weights_sha256"])
def test_an_incomplete_description_is_told(saved, key):
    edit_info(saved, lambda info: info.pop(key))
    with pytest.raises(RoutingError, match=r"routed\.json"):
        load(saved)


def test_an_unknown_format_version_is_refused(saved):
    edit_info(saved, lambda info: info.update(format_version=99))
    with pytest.raises(RoutingError, match="99"):
        load(saved)
