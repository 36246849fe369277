"""Pools: opened from folders and lists; what doesn't fit together is refused."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest

from odd_files import one_line_of
from phatgoose.base.identity import BaseReference
from phatgoose.errors import PoolError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from tiny import TINY_BASE


def complaint_about(source: object) -> str:
    return one_line_of(lambda: Pool.open(source), PoolError)


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


def test_loaded_experts_are_a_pool(llama_pool):
    one, two, *_ = llama_pool.experts
    assert Pool.open(llama_pool) is llama_pool
    assert Pool.open(one.directory).names == ("e0",)
    assert Pool.open(one).experts == (one,)
    assert Pool.open([two, one.directory]).names == ("e1", "e0")


def test_unfinished_hidden_and_foreign_folders_are_no_experts(write, tmp_path):
    for nothing in ([], Pool(())):
        assert "list of experts is empty" in complaint_about(nothing)
    with pytest.raises(PoolError, match="missing can be used"):
        Pool.open(tmp_path / "missing")
    done = write("done")
    shutil.copytree(done, done.parent / ".done-x1y2")
    shutil.copytree(done, done.parent / ".next.work" / "adapter")
    (done.parent / "notes").mkdir()
    (done.parent / "notes.txt").write_text("a file")
    assert Pool.open(done.parent).names == ("done",)


def test_a_folder_that_nobody_may_look_into_is_none(write, tmp_path, monkeypatch):
    closed, stat = write("done").parent / "lost+found", os.stat  # as disks have one
    closed.mkdir()

    def refusing(path, *how, **named):  # as for those who aren't root
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(13, "Permission denied")
        return stat(path, *how, **named)

    monkeypatch.setattr(os, "stat", refusing)
    assert Pool.open(closed.parent).names == ("done",)


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


def test_adapters_beside_experts_are_left_out_with_a_warning(write, adapter, tmp_path):
    write("a")
    shutil.copytree(adapter, tmp_path / "pool" / "plain")
    with pytest.warns(UserWarning, match=r"pool/plain is left out: it is an adapter among experts"):
        pool = Pool.open(tmp_path / "pool")
    assert pool.names == ("a",)


def test_selecting_keeps_the_order_of_the_pool_or_is_refused_with_the_reason(write, tmp_path):
    for name in ("a", "b", "c"):
        write(name)
    pool = Pool.open(tmp_path / "pool")
    assert pool.select(keep=["c", "a"]).names == pool.select(leave_out=["b"]).names == ("a", "c")
    assert pool.select(keep=["a", "b"], leave_out=["a"]).names == ("b",)
    assert pool.names == pool.select().names == ("a", "b", "c")
    with pytest.raises(PoolError, match="no expert 'x'; it has a, b, c"):
        pool.select(keep=["x"])
    with pytest.raises(PoolError, match="No expert is left"):
        pool.select(leave_out=["a", "b", "c"])


def test_an_expert_keeps_the_name_it_has_wherever_it_is_saved(adapter, tmp_path):
    Expert.from_peft(adapter, {}, base=TINY_BASE).save(tmp_path / "elsewhere")
    pool = Pool.open(tmp_path / "elsewhere")
    assert pool.names == ("reviews",)
    with pytest.raises(PoolError, match="The directory 'elsewhere' holds the expert 'reviews'"):
        pool.select(keep=["elsewhere"])
