"""DoRAs: imported, mixed with other experts and exported."""

import pytest
import torch

from phatgoose.base.loading import load_base
from phatgoose.experts.importing import import_adapter
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.export import export
from tiny import assert_same_logits, logits_of, make_adapter, make_ids


@pytest.fixture
def pool(base, tmp_path):
    """Two DoRAs of different ranks, and a LoRA."""
    for name, seed, rank, is_dora in (("a", 1, 4, True), ("b", 2, 2, True), ("lora", 3, 4, False)):
        more = {"use_dora": True} if is_dora else {}
        adapter = make_adapter(base, tmp_path / "adapters" / name, seed=seed, rank=rank, **more)
        import_adapter(adapter, tmp_path / "pool" / name)
    return Pool.open(tmp_path / "pool")


@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2"], indirect=True)
def test_changes_of_several_add_up_and_leave_as_a_model(base, pool, tmp_path):
    """At every layer: the base's output and the weighted change of each expert alone."""
    mixture, seen = {"a": 0.6, "b": -0.3, "lora": 0.5}, {}
    model = compose(pool, base, weights=mixture)

    def keep(layer, args, y):
        seen[layer] = args[0], y

    for layer in model.phatgoose.layers.values():
        layer.register_forward_hook(keep)
    logits = logits_of(model, make_ids())
    for site, layer in model.phatgoose.layers.items():
        u, y = seen[layer]
        plain = layer.base(u)
        wanted = plain.clone()
        for name, weight in mixture.items():
            module = pool[name].modules[site].at(layer.base.weight)
            wanted += weight * (module.apply(layer.base, u) - plain)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    export(model, tmp_path / "whole", merged=True)
    whole = load_base(tmp_path / "whole", dtype="float32").model
    assert_same_logits(logits_of(whole, make_ids()), logits)
