"""Pools: opened from folders, lists and manifests; what doesn't fit together is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from phatgoose.apps.cli import main
from phatgoose.base import BaseReference
from phatgoose.errors import ExpertError, PhatgooseError, PoolError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import MANIFEST_VERSION, Pool
from phatgoose.sites import find_sites
from tiny import TINY_BASE


def complaint_about(source: Any, kind: type[PhatgooseError] = PoolError) -> str:
    with pytest.raises(kind) as caught:
        Pool.open(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_manifest(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_pool_is_a_mapping_of_its_experts_in_the_order_of_names(write, tmp_path):
    for name in ("b", "a"):
        write(name)
    pool = Pool.open(tmp_path / "pool")
    assert (pool.names, len(pool), pool.base) == (("a", "b"), 2, TINY_BASE)
    assert list(pool) == list(pool.keys()) == ["a", "b"]
    assert dict(pool.items()) == {"a": pool.experts[0], "b": pool.experts[1]}
    assert pool["b"] is pool.experts[1]
    assert "c" not in pool
    assert pool.get("c") is None
    with pytest.raises(KeyError, match="no expert 'c'; it has a, b"):
        pool["c"]


def test_experts_that_are_loaded_are_a_pool(llama_pool):
    one, two, *_ = llama_pool.experts
    assert Pool.open(llama_pool) is llama_pool
    assert Pool.open(one.directory).names == ("e0",)
    assert Pool.open(one).experts == (one,)
    assert Pool.open([two, one.directory]).names == ("e1", "e0")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ([], "No expert was found in an empty list"),
        ("empty", "No expert was found in empty"),
        ("missing", "missing is no folder of experts"),
        ("nowhere.json", "nowhere.json does not exist"),
    ],
)
def test_what_is_no_pool_is_refused_in_words(tmp_path, monkeypatch, source, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert complaint in complaint_about(source)


def test_a_list_of_experts_and_folders_is_a_pool_in_its_own_order(write, tmp_path):
    one, _, _ = write("z"), write("a", place="more"), write("b", place="more")
    assert Pool.open([str(one), tmp_path / "more"]).names == ("z", "a", "b")


def test_unfinished_hidden_and_foreign_folders_are_no_experts(write, tmp_path):
    done = write("done")
    shutil.copytree(done, done.parent / ".done-x1y2")
    shutil.copytree(done, done.parent / ".next.work" / "adapter")
    (done.parent / "notes").mkdir()
    (done.parent / "notes.txt").write_text("a file")
    assert Pool.open(done.parent).names == ("done",)


def test_a_pool_knows_every_site_of_any_expert(write, llama, tmp_path):
    write("narrow", "two")
    write("wide", "four")
    pool = Pool.open(tmp_path / "pool")
    assert set(pool.sites) == set(find_sites(llama.model))
    assert len(pool.sites) == len(set(pool.sites))


UNKNOWN, OTHER = BaseReference("tiny"), BaseReference("tiny", None, "sha256:cd")
COPY = dataclasses.replace(TINY_BASE, id="copy/of-tiny")  # of the same fingerprint


@pytest.mark.parametrize(
    ("bases", "complaint"),
    [
        ((TINY_BASE, COPY), ()),
        ((UNKNOWN, TINY_BASE), ()),  # by the name of its base
        ((TINY_BASE, OTHER), ("'x0'", "'x1'")),
        ((TINY_BASE, BaseReference("large", None, "sha256:cd")), ("'tiny'", "'large'", "one base")),
        ((UNKNOWN, TINY_BASE, OTHER), ("'x1'", "'x2'")),  # which the first one can't hide
    ],
)
def test_a_pool_has_one_base(write, tmp_path, bases, complaint):
    for z, base in enumerate(bases):
        write(f"x{z}", base=base)
    if not complaint:
        assert Pool.open(tmp_path / "pool").base == TINY_BASE
    else:
        message = complaint_about(tmp_path / "pool")
        assert all(part in message for part in complaint)


def test_adapters_beside_experts_are_left_out_with_a_warning(write, adapters, tmp_path):
    write("a")
    shutil.copytree(adapters["two"], tmp_path / "pool" / "plain")
    with pytest.warns(UserWarning, match=r"holds experts, and adapters that are left out: plain\."):
        pool = Pool.open(tmp_path / "pool")
    assert pool.names == ("a",)


def test_selecting_keeps_the_order_of_the_pool(write, tmp_path):
    for name in ("a", "b", "c"):
        write(name)
    pool = Pool.open(tmp_path / "pool")
    assert pool.select().names == ("a", "b", "c")
    assert pool.select(keep=["c", "a"]).names == ("a", "c")
    assert pool.select(leave_out=["b"]).names == ("a", "c")
    assert pool.select(keep=["a", "b"], leave_out=["a"]).names == ("b",)
    assert pool.names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"keep": ["x"]}, "no expert 'x'; it has a, b"),
        ({"leave_out": ["x"]}, "no expert 'x'; it has a, b"),
        ({"leave_out": ["a", "b"]}, "No expert is left"),
        ({"keep": []}, "No expert is left"),
    ],
)
def test_a_bad_selection_is_refused_with_the_reason(write, tmp_path, options, complaint):
    write("a")
    write("b")
    with pytest.raises(PoolError, match=complaint):
        Pool.open(tmp_path / "pool").select(**options)


def test_an_expert_keeps_the_name_it_has_wherever_it_is_saved(adapters, tmp_path):
    Expert.from_peft(adapters["two"], {}, base=TINY_BASE).save(tmp_path / "elsewhere")
    pool = Pool.open(tmp_path / "elsewhere")
    assert pool.names == ("two",)
    with pytest.raises(PoolError, match="The directory 'elsewhere' holds the expert 'two'"):
        pool.select(keep=["elsewhere"])


def test_a_manifest_opens_the_same_pool(write, tmp_path):
    for name in ("b", "a"):
        write(name)
    pool = Pool.open([tmp_path / "pool" / "b", tmp_path / "pool" / "a"])
    pool.write_manifest(tmp_path / "lists" / "mine.json")
    again = Pool.open(tmp_path / "lists" / "mine.json")
    assert again.names == ("b", "a")
    assert again.records() == pool.records()


def test_a_manifest_moves_together_with_its_experts(write, tmp_path):
    write("a")
    Pool.open(tmp_path / "pool").write_manifest(tmp_path / "pool" / "pool.json")
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(tmp_path / "pool", moved)
    pool = Pool.open(str(moved / "pool.json"))
    assert pool.experts[0].directory.resolve() == (moved / "a").resolve()
    assert Pool.open(moved).names == ("a",)  # the manifest beside it is no expert
    shutil.rmtree(moved / "a")
    assert str(moved / "a") in complaint_about(moved / "pool.json", ExpertError)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"adapter": "six"}),
        ({}, {"gates": {}, "means": {}}),
        ({"gates": {}, "means": {}}, {}),
    ],
)
def test_a_manifest_notices_an_expert_that_was_replaced(write, tmp_path, before, after):
    place = write("a", **before)
    Pool.open(place).write_manifest(tmp_path / "pool.json")
    shutil.rmtree(place)
    write("a", **after)
    message = complaint_about(tmp_path / "pool.json", ExpertError)
    assert "'a'" in message
    assert f"{place} has changed" in message


def listing(*records: object, version: int = MANIFEST_VERSION) -> dict[str, object]:
    return {"manifest_version": version, "experts": list(records)}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (listing({"path": "a"}, version=MANIFEST_VERSION + 1), "version"),
        (listing(), "its experts 0"),
        *((listing(odd), "no pool manifest") for odd in ({}, "a", 5, None, [])),
        *(({**listing(), "experts": odd}, "no pool manifest") for odd in (5, None)),
        ({"experts": []}, "no pool manifest"),
        *((odd, "is not valid") for odd in ([], "text")),
        *((listing({"path": odd}), "path is") for odd in (5, None, [], {}, 1.5, True, "x" * 5000)),
        # What could steer a terminal.
        *((listing({"path": f"a{odd}"}), "path is") for odd in ("\0", "\x1b[2J", "\n", "\x85")),
        *((listing({"path": odd}), "path is") for odd in ("hub:me/x\n", "a\u2028b")),
    ],
)
def test_a_bad_manifest_is_refused_with_the_reason(tmp_path, content, complaint):
    message = complaint_about(write_manifest(tmp_path / "pool.json", content))
    assert complaint in message
    assert message.isprintable()


def test_a_revision_that_leads_out_of_the_hub_s_cache_is_refused(tmp_path):
    """huggingface_hub would read the file at its end, such as a device that never ends."""
    listed = listing({"path": "hub:me/x@../../../../../dev/zero"})
    message = complaint_about(write_manifest(tmp_path / "pool.json", listed), ExpertError)
    assert "no reference to the Hub" in message


def test_a_manifest_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "pool.json").write_text("{")
    complaint = complaint_about(tmp_path / "pool.json")
    assert "is not valid" in complaint
    with pytest.raises(SystemExit) as caught:
        main(["pool", str(tmp_path / "pool.json")])
    assert caught.value.code == 2


def test_a_manifest_is_read_and_written_where_links_to_it_stand(write, tmp_path):
    """Paths in it are relative to the file: where a link leads, and where one was replaced."""
    write("a")
    pool = Pool.open(tmp_path / "pool")
    pool.write_manifest(tmp_path / "lists" / "real.json")
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "lists" / "real.json")
    assert Pool.open(link).names == ("a",)
    pool.write_manifest(link)
    assert not link.is_symlink()
    assert Pool.open(link).names == Pool.open(tmp_path / "lists" / "real.json").names == ("a",)


def test_other_json_is_no_manifest(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert complaint_about(tmp_path / "config.json").endswith(
        "is no pool manifest: it lacks 'manifest_version'."
    )


def test_a_path_of_a_manifest_may_be_in_any_language(write, tmp_path):
    Pool.open(write("a", place="\u0645\u06cc\u200c\u062e \u3000é")).write_manifest(
        tmp_path / "pool.json"
    )
    assert Pool.open(tmp_path / "pool.json").names == ("a",)
