"""DoRAs: imported, mixed with other experts, saved and exported."""

import pytest
import torch

from phatgoose.base import load_base
from phatgoose.experts.importing import import_adapter
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach, load, save
from phatgoose.routing.export import export
from phatgoose.routing.saved import add_to_saved, remove_from_saved
from tiny import assert_same_logits, logits_of, make_adapter, make_ids

ON_TWO_KINDS = pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)


@pytest.fixture
def pool(base, tmp_path):
    """Two DoRAs of different ranks, and a LoRA."""
    for name, seed, rank, is_dora in (("a", 1, 4, True), ("b", 2, 2, True), ("lora", 3, 4, False)):
        more = {"use_dora": True} if is_dora else {}
        adapter = make_adapter(base, tmp_path / "adapters" / name, seed=seed, rank=rank, **more)
        import_adapter(adapter, tmp_path / "pool" / name)
    return Pool.open(tmp_path / "pool")


@ON_TWO_KINDS
def test_changes_of_several_add_up(base, pool):
    """At every layer: the base's output and the weighted change of each expert alone."""
    found = {}

    def keep(site):
        def hook(_, args, y):
            found[site] = args[0], y

        return hook

    mixture = {"a": 0.6, "b": -0.3, "lora": 0.5}
    layers = {site: base.model.get_submodule(site) for site in pool.sites}
    model = compose(pool, base, weights=mixture)
    handles = [
        layer.register_forward_hook(keep(site)) for site, layer in model.phatgoose.layers.items()
    ]
    logits_of(model, make_ids())
    for handle in handles:
        handle.remove()
    for site, (u, y) in found.items():
        plain = layers[site](u)
        wanted = plain.clone()
        for name, weight in mixture.items():
            module = pool[name].modules[site].at(layers[site].weight)
            wanted += weight * (module.apply(layers[site], u) - plain)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


@ON_TWO_KINDS
def test_a_routed_model_is_saved_and_grows(base, pool, tmp_path):
    model = compose(pool, base, router="arrow")
    wanted = logits_of(model, make_ids())
    save(model, tmp_path / "routed")
    detach(model)
    loaded = load(tmp_path / "routed", base)
    assert torch.equal(logits_of(loaded, make_ids()), wanted)
    detach(loaded)
    remove_from_saved(tmp_path / "routed", ["a", "b"])
    add_to_saved(tmp_path / "routed", pool.select(["b"]))
    grown = load(tmp_path / "routed", base)
    kept = logits_of(grown, make_ids())
    detach(grown)
    other = logits_of(compose(pool.select(["b", "lora"]), base, router="arrow"), make_ids())
    assert_same_logits(kept, other)


@pytest.mark.parametrize("kind", ["gpt2", "t5"], indirect=True)
def test_a_constant_mixture_leaves_as_a_model(base, pool, tmp_path):
    model = compose(pool, base, router="merged")
    wanted = logits_of(model, make_ids())
    export(model, tmp_path / "whole", merged=True)
    whole = load_base(tmp_path / "whole", dtype="float32").model
    assert_same_logits(logits_of(whole, make_ids()), wanted)


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_engines_that_apply_loras_are_not_handed_one(pool, phat, tmp_path):
    place, base = pool["a"].directory.parent, pool.base.id
    outcome = phat("export", place, "--engine", "vllm", "--base", base, "--out", tmp_path / "e")
    assert outcome.code == 2
    told = " ".join(outcome.err.split())
    assert "Expert 'a' has the kind dora, which vllm would not apply" in told
