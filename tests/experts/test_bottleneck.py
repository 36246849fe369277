"""Bottleneck adapters on disk: written, read, and refused by name when anything is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from changed_adapters import complaint_about
from golden_sites import DOWN, QUERY
from mixed_experts import make_bottleneck, make_kind
from paths import GOLDENS
from phatgoose.errors import ExpertError
from phatgoose.experts.bottleneck import FILES, BottleneckLayers
from phatgoose.experts.expert import LAYOUT, Expert, base_named_in, check_expert, read_modules
from phatgoose.experts.importing import import_adapter
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from tiny import logits_of, make_ids

GOLDEN = GOLDENS / "bottleneck"


@pytest.fixture
def adapter(tmp_path) -> Path:
    """The golden bottleneck adapter without what makes it an expert, to damage."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (FILES.config, FILES.weights):
        shutil.copyfile(GOLDEN / file, folder / file)
    return folder


def change(adapter: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(adapter / FILES.weights)
    how(tensors)
    save_file(tensors, adapter / FILES.weights)


def test_the_golden_directory_is_read_as_it_was_written():
    expert = Expert.load(GOLDEN)
    assert (expert.kind, expert.lora, set(expert.modules)) == ("bottleneck", {}, {QUERY, DOWN})
    query = expert.modules[QUERY]
    assert (query.activation, query.scale, query.size) == ("gelu", 0.5, 2)
    assert query.down.tolist() == [[-1.0, -0.75, -0.5], [-0.25, 0.0, 0.25]]
    assert query.down_bias.tolist() == [-2.0, -1.75]
    assert query.up.tolist() == [[0.5, 0.75], [1.0, 1.25], [1.5, 1.75]]
    assert query.up_bias.tolist() == [1.5, 1.75, 2.0]
    assert expert.gates[QUERY].shape == (4,)  # of the site's input, of which the adapter sees none
    y = torch.tensor([[0.5, -1.0, 2.0]])
    inner = nn.functional.gelu(y @ query.down.T + query.down_bias)
    wanted = y + 0.5 * (inner @ query.up.T + query.up_bias)
    torch.testing.assert_close(query.at(y).apply(nn.Identity(), y), wanted)
    assert base_named_in(GOLDEN).id == "example/base"


@pytest.mark.parametrize("kind", ["bottleneck", "ia3"])
def test_an_expert_is_written_and_read_without_a_change(kind, tmp_path):
    expert = Expert.load(GOLDENS / kind)
    again = expert.save(tmp_path / "again")
    assert again.info == expert.info
    assert check_expert(tmp_path / "again") == []
    for site, module in expert.modules.items():
        for name, value in vars(module).items():
            other = getattr(again.modules[site], name)
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
    kept = {path.name for path in (GOLDENS / kind).iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == kept
    for file in kept - {LAYOUT.card}:
        assert (tmp_path / "again" / file).read_bytes() == (GOLDENS / kind / file).read_bytes()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"bottleneck_version": 2}, "version 2 is unknown"),
        ({"more": 1}, "'more' is unknown"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"activation": ["relu"]}, "activation is"),
        ({"scale": 0}, "scale is 0"),
        ({"scale": True}, "scale is True"),
        ({"scale": "1"}, "scale is '1'"),
        ({"scale": 1e300}, "scale is 1e+300"),
        ({"base": None}, "base is None"),
    ],
)
def test_a_config_that_is_not_as_specified_is_refused(adapter, values, reason):
    path = adapter / FILES.config
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert reason in complaint_about(adapter)


def test_a_config_that_lacks_a_key_is_refused(adapter):
    path = adapter / FILES.config
    config = json.loads(path.read_text())
    del config["scale"]
    path.write_text(json.dumps(config))
    assert "'scale' is missing" in complaint_about(adapter)
    path.unlink()
    assert "holds no bottleneck_config.json" in complaint_about(adapter)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda t: t.pop(f"{QUERY}.up.bias"), f"site {QUERY}: wanted down.weight"),
        (lambda t: t.update({f"{QUERY}.up.bias": torch.zeros(4)}), f"site {QUERY}: wanted"),
        (lambda t: t.update({f"{QUERY}.down.bias": torch.zeros(2, 1)}), f"site {QUERY}: wanted"),
        (lambda t: t.update({f"{DOWN}.up.weight": torch.zeros(4, 3)}), f"site {DOWN}: wanted"),
        (lambda t: t.update({f"{DOWN}.up.weight": torch.zeros(4, 2).long()}), "floating point"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "'extra', which is no part"),
        (lambda t: t[f"{DOWN}.up.weight"].fill_(float("nan")), "not finite"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused(adapter, how, reason):
    change(adapter, how)
    assert reason in complaint_about(adapter)


def test_layers_of_unlike_settings_are_no_adapter(tmp_path):
    parts = (torch.ones(2, 3), torch.ones(2), torch.ones(3, 2), torch.ones(3))
    layers = {
        "a": BottleneckLayers(*parts, activation="relu"),
        "b": BottleneckLayers(*parts, activation="silu"),
    }
    with pytest.raises(ExpertError, match="share their activation"):
        BottleneckLayers.write(tmp_path, layers, {"base": "base"})
    del layers["b"]
    BottleneckLayers.write(tmp_path, layers, {"base": "base"})
    assert torch.equal(read_modules(tmp_path)["a"].up, parts[2])


def test_a_bare_bottleneck_adapter_is_imported(llama, base_folders, tmp_path):
    bare, base = make_bottleneck(llama, tmp_path / "bare"), str(base_folders["llama"])
    expert = import_adapter(bare, tmp_path / "mine", base=base)
    assert (expert.kind, expert.info.base.id) == ("bottleneck", base)
    weights = (expert.directory / FILES.weights).read_bytes()
    assert weights == (bare / FILES.weights).read_bytes()
    with pytest.raises(ExpertError, match="which the base model lacks"):
        import_adapter(bare, tmp_path / "other", base=str(base_folders["gpt2"]))
    assert not (tmp_path / "other").exists()


def test_many_bottlenecks_are_routed_under_autocast(llama, tmp_path):
    pool = Pool(tuple(make_kind("bottleneck", llama, tmp_path, seed=seed) for seed in range(6)))
    model = compose(pool, llama, router="phatgoose", k=2)  # few of many: grouped by expert
    wanted = logits_of(model, make_ids())
    with torch.autocast("cpu", torch.bfloat16):
        got = logits_of(model, make_ids())
    assert (got - wanted).abs().mean() < 0.1 * wanted.abs().mean()
