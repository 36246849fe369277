"""Saved routed models: read strictly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from phatgoose.base import load_base
from phatgoose.errors import RoutingError, WrongBaseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.routers.registry import ROUTERS
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.routing.saved.tensors import read_saved, shareable
from routed_models import compose_by, of_task
from tiny import logits_of, make_ids, make_model


def gone(pool: Pool) -> Pool:
    """The pool in memory alone: as if its experts' files had been deleted."""
    return Pool(tuple(replace(e, directory=Path("gone") / e.name) for e in pool.experts))


@pytest.mark.parametrize(
    ("router", "ranks"),
    [*((router, (2, 3, 4)) for router in ROUTERS), ("merged", (24, 9, 20))],
    ids=[*ROUTERS, "merged and folded"],
)
def test_a_loaded_model_is_the_saved_one_without_the_experts_files(
    base, kind, pool_of, toy_embedder, tmp_path, router, ranks
):
    pool, ids = gone(pool_of(kind, ranks)), make_ids(rows=2)
    model = compose_by(router, pool, base)
    wanted = logits_of(model, ids)
    kinds = {type(layer) for layer in composition_of(model).layers.values()}
    assert (RoutedLinear in kinds) == (ranks[0] < 9)  # ranks that are large fold everywhere
    save(model, tmp_path / "routed")
    loaded = of_task(load(tmp_path / "routed", dtype="float32"), "second")
    assert loaded is not model
    assert {type(layer) for layer in composition_of(loaded).layers.values()} == kinds
    assert torch.equal(logits_of(loaded, ids), wanted)
    again = tmp_path / "again"
    save(loaded, again)
    for file in ("routed.json", "routed.safetensors"):
        assert (again / file).read_bytes() == (tmp_path / "routed" / file).read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place, _: None, "there is no such folder"),
        (lambda place, _: place.mkdir(), "it is an empty folder"),
        (lambda place, _: place.write_text(""), "it is a file"),
        (lambda place, e: copytree(e.directory, place), r"it is one expert. Route it with compose"),
        (lambda place, e: copytree(e.directory, place / "e0"), "it is a pool of experts"),
        (lambda place, e: copytree(adapter_of(e), place), "it is a PEFT adapter. Route it"),
        (lambda place, e: copytree(adapter_of(e), place / "e0"), "it is a folder of PEFT adapters"),
        (lambda place, e: copytree(e.info.base.id, place), "it is a plain model"),
    ],
)
def test_another_folder_is_told_by_what_it_is(llama_pool, tmp_path, make, message):
    make(tmp_path / "it", llama_pool.experts[0])
    with pytest.raises(RoutingError, match=rf"it holds no routed model: {message}"):
        load(tmp_path / "it")
    with pytest.raises(RoutingError, match=r"it names a pool. Route that with compose"):
        load("hub:me/experts")


def adapter_of(expert: Expert) -> Path:
    return expert.directory.parent.parent / "adapters" / expert.name


def test_a_model_in_bfloat16_is_loaded_bit_for_bit(llama, llama_pool, tmp_path):
    base = load_base(llama.id, dtype="bfloat16")
    model = compose(llama_pool, base, router="phatgoose")
    save(model, tmp_path / "routed")
    loaded = load(tmp_path / "routed", dtype="bfloat16")
    assert torch.equal(logits_of(loaded, make_ids()), logits_of(model, make_ids()))


def test_a_base_by_its_name_is_loaded_in_the_dtype_asked_for(llama, llama_pool, tmp_path):
    save(compose(llama_pool, llama, router="phatgoose"), tmp_path / "routed")
    for dtype in (torch.float32, torch.bfloat16):
        asked = str(dtype).removeprefix("torch.")
        for name in (None, llama.id, Path(llama.id)):
            assert load(tmp_path / "routed", name, dtype=asked).dtype == dtype


def test_settings_and_names_are_kept(llama, llama_pool, tmp_path):
    model = compose(
        llama_pool,
        llama,
        k=3,
        kernel="gather",
        keep=["e3", "e1", "e0"],
        router="phatgoose:eps=0.001",
    )
    save(model, tmp_path / "routed")
    saved, parts = composition_of(model), composition_of(load(tmp_path / "routed", dtype="float32"))
    assert parts.routing == saved.routing
    assert parts.experts == saved.experts == ("e0", "e1", "e3")
    assert parts.records == shareable(saved.records)
    assert parts.base == saved.base


def test_the_loaded_model_can_be_given_its_base(llama, llama_pool, saved):
    wanted = logits_of(compose(llama_pool, llama, router="phatgoose"), make_ids())
    detach(llama.model)
    for base in (llama, llama.model):
        loaded = load(saved, base)
        assert loaded is llama.model
        assert torch.equal(logits_of(loaded, make_ids()), wanted)
        detach(loaded)


def test_another_base_is_refused(saved):
    other = make_model("llama", seed=1)
    with pytest.raises(WrongBaseError, match="fingerprint"):
        load(saved, other)
    assert not hasattr(other, "phatgoose")


def test_a_routed_base_is_refused(llama, llama_pool, saved):
    with pytest.raises(RoutingError, match="routed already"):
        load(saved, compose(llama_pool, llama, router="phatgoose"))


def test_changed_weights_are_refused(saved):
    tensors = load_file(saved / "routed.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, saved / "routed.safetensors")
    with pytest.raises(RoutingError, match="changed"):
        load(saved)


def test_missing_weights_are_told(saved):
    (saved / "routed.safetensors").unlink()
    with pytest.raises(RoutingError, match=r"routed\.safetensors"):
        load(saved)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(RoutingError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 1}'])
def test_a_damaged_description_is_told(saved, content):
    (saved / "routed.json").write_text(content)
    with pytest.raises(RoutingError, match=r"routed\.json"):
        load(saved)


def test_what_is_in_the_file_is_mapped_and_not_copied(llama, pair):
    first = read_saved(pair).tensors
    name = next(name for name in first if name.startswith("A."))
    assert first[name].untyped_storage().nbytes() == (pair / "routed.safetensors").stat().st_size
    assert {first[name].untyped_storage().data_ptr() for name in first if name[1] == "."} == {
        first[name].untyped_storage().data_ptr()
    }
