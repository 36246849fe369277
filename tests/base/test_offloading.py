"""Models whose weights accelerate keeps elsewhere: routed before or after that, with one result."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from transformers import AutoModelForCausalLM, PreTrainedModel

from phatgoose.base import Base, fingerprint, load_skeleton
from phatgoose.errors import BaseModelError, RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.saved import load, save
from phatgoose.sites import ROUTED
from phatgoose.tasks.task import Example, Task
from routed_models import compose_by
from tiny import assert_same_logits, logits_of, make_ids

OFFLOADED: dict[str, Callable[[PreTrainedModel, Path], Any]] = {
    "cpu": lambda model, _: cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "some": lambda model, folder: dispatch_model(
        model, some_on_disk(model), main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}
each_way = pytest.mark.parametrize("way", OFFLOADED)


def some_on_disk(model: PreTrainedModel) -> dict[str, str]:
    """A device map with the last block of each stack on the disk."""
    places: dict[str, str] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2] == "1"
        whole = last or next(module.parameters(recurse=False), None) is not None
        if (whole or not list(module.children())) and not name.startswith(tuple(covered(places))):
            places[name] = "disk" if last else "cpu"
    return places


def covered(places: dict[str, str]) -> list[str]:
    return [f"{place}." for place in places]


def offloaded(base: Base, way: str, folder: Path) -> Base:
    OFFLOADED[way](base.model, folder)
    return base


@each_way
def test_a_routed_model_that_is_offloaded_says_the_same(base, pool, way, tmp_path):
    ids, model = make_ids(rows=2), compose(pool, base, router="phatgoose")
    wanted, state = logits_of(model, ids), model.state_dict()
    OFFLOADED[way](model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_same_logits(logits_of(model, ids), wanted)
    assert model.state_dict().keys() == state.keys()


@each_way
def test_experts_join_a_base_that_is_offloaded(kind, base, pool, way, tmp_path, loaded_bases):
    ids = make_ids(rows=2)
    wanted = logits_of(compose(pool, copy.deepcopy(loaded_bases[kind]), router="phatgoose"), ids)
    offloaded(base, way, tmp_path)
    assert fingerprint(base.model) == pool.base.fingerprint
    model = compose(pool, base.model, router="phatgoose")
    assert_same_logits(logits_of(model, ids), wanted)
    assert logits_of(detach(model), ids).isfinite().all()


def test_experts_join_a_base_that_transformers_put_on_a_disk(llama, llama_pool, tmp_path):
    ids = make_ids()
    places = some_on_disk(llama.model)
    found = AutoModelForCausalLM.from_pretrained(
        llama.id, device_map=places, offload_folder=tmp_path, dtype=torch.float32
    )
    assert any(parameter.is_meta for parameter in found.parameters())
    wanted = logits_of(compose(llama_pool, llama, router="phatgoose"), ids)
    assert_same_logits(logits_of(compose(llama_pool, found, router="phatgoose"), ids), wanted)


def test_merged_experts_join_an_offloaded_base_unfolded(llama, pool_of, tmp_path):
    pool, ids = pool_of("llama", (24, 9, 20)), make_ids()
    model = compose(pool, copy.deepcopy(llama), router="merged")
    save(model, tmp_path / "merged")
    wanted = logits_of(model, ids)
    found = compose(pool, offloaded(llama, "cpu", tmp_path), router="merged")
    assert_same_logits(logits_of(found, ids), wanted)
    detach(found)
    assert_same_logits(logits_of(load(tmp_path / "merged", llama), ids), wanted)


def test_folded_experts_need_the_biases_of_their_base(loaded_bases, pool_of, tmp_path):
    pool = pool_of("gpt2", (24, 24, 24))
    save(compose(pool, copy.deepcopy(loaded_bases["gpt2"]), router="merged"), tmp_path / "merged")
    base = offloaded(copy.deepcopy(loaded_bases["gpt2"]), "cpu", tmp_path)
    with pytest.raises(RoutingError, match="folded into a weight"):
        load(tmp_path / "merged", base)
    assert not hasattr(base.model, ROUTED)


def test_a_base_without_weights_is_refused_before_anything_happens(llama, llama_pool):
    empty = load_skeleton(llama.id)
    with pytest.raises(BaseModelError, match=r"has no weights: .* Load it with weights\.$"):
        compose(llama_pool, empty, router="phatgoose")
    llama.model.to("meta")
    with pytest.raises(BaseModelError, match="has no weights"):
        compose(llama_pool, llama, router="phatgoose")
    assert not hasattr(llama.model, ROUTED)


def test_what_was_offloaded_after_composing_stays_as_it_is_until_it_is_back(llama, llama_pool):
    ids, model = (
        make_ids(),
        compose(llama_pool.select(["e0", "e1", "e2"]), llama, router="phatgoose"),
    )
    wanted = logits_of(model, ids)
    plain = logits_of(detach(model), ids)
    compose(llama_pool.select(["e0", "e1", "e2"]), llama, router="phatgoose")
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(RoutingError, match="remove_hook_from_submodules"):
        detach(model)
    assert_same_logits(logits_of(model, ids), wanted)
    remove_hook_from_submodules(model)
    assert torch.equal(logits_of(detach(model), ids), plain)


@pytest.mark.parametrize("router", ["phatgoose", "discriminant"])
def test_an_offloaded_model_is_evaluated_and_saved(llama, llama_pool, router, tmp_path):
    tasks = [
        Task(
            "choose", test=(Example("is it?", "yes", ("yes", "no")), Example("or", "a", ("a", "b")))
        ),
        Task("say", test=(Example("so?", "no"),)),
    ]
    model = compose_by(router, llama_pool, llama)
    wanted = evaluate(model, tasks, max_new_tokens=3)
    detach(model)
    offloaded(llama, "cpu", tmp_path)
    model = compose_by(router, llama_pool, llama)
    assert model.device.type == "meta"
    got = evaluate(model, tasks, max_new_tokens=3)
    for one, other in zip(got.scores, wanted.scores, strict=True):
        for answer, right in zip(one.predictions, other.predictions, strict=True):
            assert answer.answer == right.answer
            assert answer.scores == pytest.approx(right.scores, abs=1e-5)
    save(model, tmp_path / "routed")
    layers = composition_of(model).layers
    detach(model)
    for name, layer in composition_of(load(tmp_path / "routed", llama)).layers.items():
        assert torch.equal(layer.A, layers[name].A)
