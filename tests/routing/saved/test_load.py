import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phatgoose.base.loading import load_base
from phatgoose.errors import RoutingError, WrongBaseError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.layers import RoutedLinear
from phatgoose.routing.recording import record
from phatgoose.routing.routers.registry import ROUTERS
from phatgoose.routing.saved import save as saving
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from routed_models import compose_by, of_task
from tiny import logits_of, make_ids, make_model


@pytest.fixture
def saved(llama, llama_pool, tmp_path):
    """A folder with the routed tiny Llama."""
    save(compose(llama_pool, llama), tmp_path / "routed")
    detach(llama.model)
    return tmp_path / "routed"


def edit_info(folder, change):
    path = folder / "routed.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


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


def test_a_model_in_bfloat16_is_loaded_bit_for_bit(llama, llama_pool, tmp_path):
    base = load_base(llama.id, dtype="bfloat16")
    model = compose(llama_pool, base)
    save(model, tmp_path / "routed")
    loaded = load(tmp_path / "routed", dtype="bfloat16")
    assert torch.equal(logits_of(loaded, make_ids()), logits_of(model, make_ids()))


def test_settings_and_names_are_kept(llama, llama_pool, tmp_path):
    model = compose(llama_pool, llama, k=3, kernel="gather", keep=["e3", "e1", "e0"], eps=1e-3)
    save(model, tmp_path / "routed")
    saved, parts = composition_of(model), composition_of(load(tmp_path / "routed", dtype="float32"))
    assert parts.routing == saved.routing
    assert parts.experts == saved.experts == ("e0", "e1", "e3")
    assert parts.records == saved.records
    assert parts.base == saved.base


def test_experts_on_some_sites_only_keep_their_places(llama, make_expert, tmp_path):
    pool = Pool(
        (
            make_expert(llama, "everywhere"),
            make_expert(llama, "attention", seed=1, target_modules=["q_proj"]),
        )
    )
    model = compose(pool, llama)
    save(model, tmp_path / "routed")
    loaded = load(tmp_path / "routed", dtype="float32")
    recordings = []
    for either in (model, loaded):
        with record(either) as recording:
            logits_of(either, make_ids())
        recordings.append(recording.usage())
    assert recordings[0].keys() == recordings[1].keys()
    assert all(torch.equal(recordings[0][site], recordings[1][site]) for site in recordings[0])


def test_the_loaded_model_can_be_given_its_base(llama, llama_pool, saved):
    wanted = logits_of(compose(llama_pool, llama), make_ids())
    detach(llama.model)
    for base in (llama, llama.model):
        loaded = load(saved, base)
        assert loaded is llama.model
        assert torch.equal(logits_of(loaded, make_ids()), wanted)
        detach(loaded)


def test_a_loaded_model_can_be_saved_again(saved, tmp_path):
    save(load(saved, dtype="float32"), tmp_path / "again")
    first, again = (
        load_file(folder / "routed.safetensors") for folder in (saved, tmp_path / "again")
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_the_base_is_not_saved(llama, saved):
    routed = sum(tensor.numel() for tensor in load_file(saved / "routed.safetensors").values())
    embedding = llama.model.get_input_embeddings().weight
    assert not any(
        tensor.shape == embedding.shape
        for tensor in load_file(saved / "routed.safetensors").values()
    )
    assert routed > 0
    assert sorted(path.name for path in saved.iterdir()) == ["routed.json", "routed.safetensors"]


def test_saving_leaves_nothing_else_behind(saved):
    assert [path.name for path in saved.parent.iterdir() if "routed" in path.name] == ["routed"]


def test_another_base_is_refused(saved):
    other = make_model("llama", seed=1)
    with pytest.raises(WrongBaseError, match="fingerprint"):
        load(saved, other)
    assert not hasattr(other, "phatgoose")


def test_a_routed_base_is_refused(llama, llama_pool, saved):
    with pytest.raises(RoutingError, match="routed already"):
        load(saved, compose(llama_pool, llama))


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


@pytest.mark.parametrize("key", ["base", "routing", "experts", "weights_sha256"])
def test_an_incomplete_description_is_told(saved, key):
    edit_info(saved, lambda info: info.pop(key))
    with pytest.raises(RoutingError, match=r"routed\.json"):
        load(saved)


def test_an_unknown_format_version_is_refused(saved):
    edit_info(saved, lambda info: info.update(format_version=99))
    with pytest.raises(RoutingError, match="99"):
        load(saved)


def test_a_plain_model_is_not_saved(llama, tmp_path):
    with pytest.raises(RoutingError, match="not routed"):
        save(llama.model, tmp_path / "routed")
    assert not (tmp_path / "routed").exists()


def test_nothing_is_overwritten_unless_asked_for(llama, llama_pool, saved):
    content = (saved / "routed.json").read_text()
    model = compose(llama_pool, llama, k=1)
    with pytest.raises(RoutingError, match="exists already"):
        save(model, saved)
    assert (saved / "routed.json").read_text() == content
    save(model, saved, overwrite=True)
    assert composition_of(load(saved, dtype="float32")).routing.k == 1


@pytest.mark.parametrize("step", ["save_file", "sha256_of"])
def test_a_failed_overwrite_keeps_the_old_folder(llama, llama_pool, saved, monkeypatch, step):
    model = compose(llama_pool, llama, k=1)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, step, fail)
    with pytest.raises(KeyboardInterrupt):
        save(model, saved, overwrite=True)
    monkeypatch.undo()
    assert composition_of(load(saved, dtype="float32")).routing.k == 2


@pytest.mark.parametrize("failing", [1, 2])
def test_an_overwrite_that_fails_at_the_end_keeps_the_old_folder(
    llama, llama_pool, saved, monkeypatch, failing
):
    model = compose(llama_pool, llama, k=1)
    rename, calls = os.rename, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == failing:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr("os.rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, saved, overwrite=True)
    monkeypatch.undo()
    assert composition_of(load(saved, dtype="float32")).routing.k == 2


def test_a_place_that_cannot_be_written_is_told(llama, llama_pool, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RoutingError, match="can't be written"):
        save(compose(llama_pool, llama), tmp_path / "file" / "routed")
