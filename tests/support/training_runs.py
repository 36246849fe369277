"""Short trainings of tiny experts, interrupted anywhere, and their losses computed one by one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from phatgoose.config import IA3, Bottleneck, Dora, GateTraining, Lora, Peft, Training
from phatgoose.experts.alone import applied
from phatgoose.experts.expert import Expert
from phatgoose.tasks.task import Example, Task
from phatgoose.training.train_expert import train_expert


def words(*targets: str) -> tuple[Example, ...]:
    return tuple(Example(f"say {word}", word) for word in targets)


TASK = Task(
    "echo", words("a", "bee", "seedy", "of", "gee", "ice"), validation=words("yes", "no", "maybe")
)
LORA = Lora(rank=2, alpha=4)
TRAINING = Training(steps=4, batch_size=4, micro_batch_size=2, learning_rate=0.02, eval_every=2)
GATES = GateTraining(gate_steps=2)
ADAPTER = "adapter_model.safetensors"


def train(base, out: Path, task: Task = TASK, training: Training = TRAINING, **options) -> Expert:
    settings = {"peft": LORA, "gate_training": GATES, **options}
    return train_expert(base, task, out=out, training=training, **settings)


def target_nll(model, base, examples) -> Tensor:
    """The negative log-likelihood of every target token, one example at a time, no padding."""

    def read(ids: list[int], **inputs: Tensor) -> Tensor:
        return model(torch.tensor([ids]), **inputs).logits[0]

    losses = []
    for example in examples:
        prompt = base.tokenizer(example.input)["input_ids"]
        space = "" if base.is_encoder_decoder or example.input.endswith(" ") else " "
        target = base.tokenizer(space + example.target, add_special_tokens=False)["input_ids"] + [1]
        if base.is_encoder_decoder:
            shifted = torch.tensor([[0, *target[:-1]]])
            logits = read(prompt, decoder_input_ids=shifted)
        else:
            logits = read(prompt + target)[len(prompt) - 1 : -1]
        losses.append(-logits.float().log_softmax(-1)[range(len(target)), target])
    return torch.cat(losses)


def assert_same_expert(got: Expert, wanted: Expert) -> None:
    """Bit for bit the same adapter and gates."""
    assert (got.directory / ADAPTER).read_bytes() == (wanted.directory / ADAPTER).read_bytes()
    assert got.gates.keys() == wanted.gates.keys()
    assert all(torch.equal(got.gates[site], wanted.gates[site]) for site in wanted.gates)


def gated_loss(base, expert: Expert, examples) -> float:
    """The loss of the base with the saved expert behind its saved gates."""
    with applied(base.model, expert.modules, gated=True) as layers:
        for site, layer in layers.items():
            layer.gate.data.copy_(expert.gates[site])
        return target_nll(base.model, base, examples).mean().item()


SHAPES: dict[str, Peft] = {
    "ia3": IA3(),
    "houlsby": Bottleneck(size=5, activation="gelu", scale=2.0),
    "pfeiffer": Bottleneck(placement="pfeiffer", size=3),
    "dora": Dora(rank=2, alpha=4),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)
