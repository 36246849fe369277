"""Training (IA)³, bottleneck and DoRA experts: what is trained, where, and what is kept of it."""

from dataclasses import replace

import pytest
import torch

from phatgoose.config import GateTraining, Lora
from phatgoose.experts.alone import applied
from phatgoose.experts.expert import Expert
from phatgoose.experts.ia3 import scales_input
from phatgoose.sites import find_sites
from phatgoose.training.train_expert import fresh_expert, placed_sites
from tiny import assert_same_logits, logits_of, make_ids, peft_model
from training_runs import (
    GATES,
    SHAPES,
    TASK,
    TRAINING,
    each_shape,
    gated_loss,
    target_nll,
    train,
)

ENDS = {  # the ends of the sites' names at which each kind acts; (IA)³'s last one on its input
    ("llama", "ia3"): ("k_proj", "v_proj", "down_proj"),
    ("llama", "houlsby"): ("o_proj", "down_proj"),
    ("llama", "pfeiffer"): ("down_proj",),
    ("t5", "ia3"): ("Attention.k", "Attention.v", "DenseReluDense.wo"),
    ("t5", "houlsby"): ("Attention.o", "DenseReluDense.wo"),
    ("t5", "pfeiffer"): ("DenseReluDense.wo",),
}


@pytest.mark.parametrize(("kind", "shape"), ENDS, indirect=["kind"])
def test_experts_act_where_the_papers_put_them(base, kind, shape):
    sites, ends = placed_sites(base.model, SHAPES[shape]), ENDS[kind, shape]
    assert set(sites) == {site for site in find_sites(base.model) if site.endswith(ends)}
    if shape == "ia3":
        assert scales_input(base.model, sites) == {s for s in sites if s.endswith(ends[-1])}


@each_shape
@pytest.mark.parametrize("joint", [False, True])
def test_only_the_experts_parameters_are_trained_and_they_start_at_nothing(base, shape, joint):
    ids = make_ids()
    wanted, modules = logits_of(base.model, ids), dict(base.model.named_modules())
    sites = placed_sites(base.model, SHAPES[shape])
    with fresh_expert(base, SHAPES[shape], joint=joint) as fresh:
        parameters = [p for p in fresh.model.parameters() if p.requires_grad]
        assert all(parameter.dtype == torch.float32 for parameter in parameters)
        with_gates = {p.shape for p in parameters} >= {(s.in_features,) for s in sites.values()}
        assert with_gates or not joint
        assert_same_logits(logits_of(fresh.model.eval(), ids), wanted)
    assert dict(base.model.named_modules()) == modules
    assert torch.equal(logits_of(base.model, ids), wanted)


@pytest.mark.parametrize(
    ("kind", "joint"), [("llama", False), ("t5", False), ("llama", True)], indirect=["kind"]
)
@each_shape
def test_an_expert_is_trained_saved_and_is_what_was_validated(base, shape, joint, tmp_path):
    options = {"peft": SHAPES[shape], "gate_training": GateTraining(joint=True) if joint else GATES}
    training = replace(TRAINING, learning_rate=0.1)
    expert = train(base, tmp_path / "echo", training=training, **options)
    Expert.load(expert.directory)
    assert expert.kind == (shape if shape in ("ia3", "dora") else "bottleneck")
    assert expert.info.hyperparameters["peft"] == expert.kind
    assert expert.gates.keys() == expert.means.keys() == expert.modules.keys()
    assert expert.modules.keys() == placed_sites(base.model, SHAPES[shape]).keys()
    assert all(gate.any() for gate in expert.gates.values())
    alone = logits_of(base.model, make_ids())
    with applied(base.model, expert.modules), torch.no_grad():
        got = logits_of(base.model, make_ids())
        loss = target_nll(base.model, base, TASK.validation).mean().item()
    loss = gated_loss(base, expert, TASK.validation) if joint else loss
    assert expert.info.metrics["expert_validation_loss"] == pytest.approx(loss, abs=1e-4)
    assert not torch.allclose(got, alone, atol=1e-3)
    if shape == "ia3":
        assert_same_logits(got, logits_of(peft_model(base, expert.directory), make_ids()))


def test_lora_starts_as_the_method_says(llama):
    with fresh_expert(llama, Lora(rank=16, alpha=4), joint=False) as fresh:
        A, B = (torch.cat([p[name].flatten() for p in fresh.parts.values()]) for name in "AB")
    assert fresh.parts.keys() == find_sites(llama.model).keys()
    assert A.std().item() == pytest.approx(0.01, rel=0.05)
    assert not B.any()
