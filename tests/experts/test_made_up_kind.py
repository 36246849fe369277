"""The kind of docs/extending.md, in every place that depends on kinds, without an edit of ours."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mixed_experts import MAKERS, make_kind, mixed_output, ordered
from oracle import token_weights
from paths import ROOT
from phatgoose.analysis.audit import signs_of
from phatgoose.base.identity import Base
from phatgoose.config import GateTraining
from phatgoose.errors import RoutingError
from phatgoose.experts import KINDS
from phatgoose.experts.alone import applied
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, load, save
from phatgoose.routing.export import export
from phatgoose.routing.saved import add_to_saved, remove_from_saved
from phatgoose.sites import find_sites
from routed_models import assert_is_that_of, composed
from tiny import assert_same_logits, logits_of, make_ids, peft_model
from training_runs import TASK, gated_loss, target_nll, train

DOCUMENT = ROOT / "docs" / "extending.md"


def code_of_the_kind() -> str:
    text = DOCUMENT.read_text(encoding="utf-8").partition("## A kind of expert")[2]
    return re.search(r"<!-- runs -->\n```python\n(.*?)^```", text, re.M | re.S).group(1)


def _defined() -> SimpleNamespace:
    names: dict[str, object] = {"__name__": "shifts"}
    exec(compile(code_of_the_kind(), str(DOCUMENT), "exec", dont_inherit=True), names)
    return SimpleNamespace(**names, kind=KINDS.pop("shift"))


SHIFTS = _defined()


def make_shift(base: Base, folder: Path, *, seed: int = 0) -> Path:
    """An adapter of random vectors at every site."""
    generator = torch.Generator().manual_seed(seed)
    shifts = {
        name: SHIFTS.ShiftModule(torch.randn(site.out_features, generator=generator))
        for name, site in find_sites(base.model).items()
    }
    folder.mkdir(parents=True)
    return SHIFTS.ShiftModule.write(folder, shifts, {"base": base.id})


def register(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Make the kind known until the test ends, its stack with other class attributes."""
    part = type("Stack", (SHIFTS.ShiftStack,), changes)
    monkeypatch.setitem(KINDS, "shift", replace(SHIFTS.kind, parts=(part,)))
    monkeypatch.setitem(MAKERS, "shift", make_shift)


def pool_with_shifts(pool: Pool, base: Base, folder: Path) -> Pool:
    """`pool` with the shifts "shift8" and "shift9"; the kind must be known."""
    shifts = (make_kind("shift", base, folder, seed=seed) for seed in (8, 9))
    return Pool((*pool.experts, *shifts))


@pytest.fixture
def shifts(monkeypatch):
    register(monkeypatch)


@pytest.fixture
def pool(shifts, llama, llama_mixed, tmp_path) -> Pool:
    """Eight experts of our kinds, and two of the made-up one."""
    return pool_with_shifts(llama_mixed, llama, tmp_path)


@pytest.mark.parametrize("joint", [False, True])
def test_it_is_trained(shifts, llama, joint, tmp_path):
    settings = SHIFTS.Shift(sites="(o|down)_proj")
    gates = GateTraining(joint=joint, gate_steps=2)
    expert = train(llama, tmp_path / "echo", peft=settings, gate_training=gates)
    Expert.load(expert.directory)
    assert expert.info.hyperparameters["peft"] == expert.kind == "shift"
    assert {site.rpartition(".")[2] for site in expert.modules} == {"o_proj", "down_proj"}
    assert all(module.b.any() for module in expert.modules.values())
    assert all(gate.any() for gate in expert.gates.values())
    if joint:
        loss = gated_loss(llama, expert, TASK.validation)
    else:
        with applied(llama.model, expert.modules):
            loss = target_nll(llama.model, llama, TASK.validation).mean().item()
    assert expert.info.metrics["expert_validation_loss"] == pytest.approx(loss, abs=1e-4)
    assert "shift expert" in (expert.directory / "README.md").read_text()


def test_it_is_mixed_with_other_kinds(pool, llama):
    layers = composition_of(compose(pool, llama, k=4, router="phatgoose")).layers
    for site, layer in layers.items():
        u = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        weights = (token_weights(t, pool.experts, site, 4) for t in u)
        wanted = [
            mixed_output(layer.base, t, pool.experts, w, site)
            for t, w in zip(u, weights, strict=True)
        ]
        torch.testing.assert_close(layer(u), torch.stack(wanted).float(), rtol=1e-5, atol=1e-5)
    assert any({"lora", "shift"} <= layer.stack.parts.keys() for layer in layers.values())


def test_it_is_saved_grown_and_shrunk(pool, llama, tmp_path):
    left, folder = ordered(pool, ["lora0", "bottleneck3", "shift9"]), tmp_path / "routed"
    save(composed("phatgoose", ordered(pool, ["lora0", "shift8"]), llama), folder)
    add_to_saved(folder, ordered(pool, ["bottleneck3", "shift9"]))
    remove_from_saved(folder, ["shift8"])
    assert_is_that_of(folder, "phatgoose", left, llama)
    wanted = logits_of(composed("phatgoose", left, llama), make_ids())
    assert torch.equal(logits_of(load(folder, copy.deepcopy(llama)), make_ids()), wanted)


def test_it_is_exported(pool, llama, tmp_path):
    model = compose(
        ordered(pool, ["lora0", "shift8", "shift9"]), copy.deepcopy(llama), router="merged"
    )
    ids = make_ids()
    export(model, tmp_path / "mean")
    got = logits_of(peft_model(llama, tmp_path / "mean"), ids)
    assert_same_logits(got, logits_of(model, ids))


def test_what_its_record_does_not_know_is_refused_by_name(
    monkeypatch, llama, llama_mixed, tmp_path
):
    register(monkeypatch, compared=(), constant=lambda self, weights: None)
    pool = pool_with_shifts(llama_mixed, llama, tmp_path)
    assert signs_of(pool)["update_size"].isnan().any()
    model = compose(ordered(pool, ["lora0", "shift8"]), llama, router="merged")
    with pytest.raises(RoutingError, match="'shift8' is of the kind 'shift'"):
        export(model, tmp_path / "out")
