"""What a routed model's folder says of it."""

from __future__ import annotations

import json

import pytest

from phatgoose.errors import RoutingError
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.tensors import read_description, removed_in


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


def test_names_are_each_once_among_the_experts_that_are_left(saved):
    def named_alike(info):
        info["experts"][1]["name"] = info["experts"][0]["name"]

    path = saved / "routed.json"
    edit_info(saved, named_alike)
    with pytest.raises(RoutingError, match="has no name of its own"):
        read_description(path)
    edit_info(saved, lambda info: info.update(removed=[0]))
    assert removed_in(read_description(path)) == {0}
    edit_info(saved, lambda info: info.update(removed=[1]))
    assert removed_in(read_description(path)) == {1}


@pytest.mark.parametrize("removed", [{}, "", None, [0, 0], [-1], [True], [0.0], [[0]], [99]])
def test_what_was_removed_is_a_list_of_indices(saved, removed):
    edit_info(saved, lambda info: info.update(removed=removed))
    with pytest.raises(RoutingError, match=r"routed\.json is not a valid description"):
        read_description(saved / "routed.json")


def test_an_unknown_format_version_is_refused(saved):
    edit_info(saved, lambda info: info.update(format_version=99))
    with pytest.raises(RoutingError, match="99"):
        load(saved)
