"""Options that several commands share."""

from __future__ import annotations

from phatgoose.apps.cli.options import open_pool, split


def test_names_are_repeated_or_listed():
    assert split(["a,b", "c", ",d,"]) == ["a", "b", "c", "d"]
    assert split(None) == []


def test_one_place_or_several_make_a_pool(llama_pool):
    one, two = (expert.directory for expert in llama_pool.experts[:2])
    assert open_pool([one.parent]).names == llama_pool.names
    assert open_pool([one, two]).names == ("e0", "e1")
