"""Short trainings of tiny experts, interrupted anywhere, and their losses computed one by one."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from phatgoose.config import IA3, Bottleneck, Dora, GateTraining, Lora, Peft, Training
from phatgoose.experts.expert import Expert
from phatgoose.experts.kind import applied
from phatgoose.tasks.task import Example, Task
from phatgoose.training.train_expert import GatedLinear, train_expert
from tiny import logits_of


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


def trained(base, out: Path, by: Callable[..., Expert] = train, **options) -> Expert:
    """What `by(base, out, **options)` makes, at `out`: trained at the first call, then copied.

    For tests of an expert, not of its training.
    """
    asked = [(name, getattr(value, "digest", value)) for name, value in sorted(options.items())]
    key = repr((by.__module__, base.reference, base.model.dtype, out.name, asked))
    if key in TRAINED:
        out.mkdir(parents=True)
        for name, content in TRAINED[key].items():
            (out / name).write_bytes(content)
        return Expert.load(out)
    expert = by(base, out, **options)
    TRAINED[key] = {path.name: path.read_bytes() for path in out.iterdir()}
    return expert


TRAINED: dict[str, dict[str, bytes]] = {}  # files by name, of what was trained with these options


def target_nll(model, base, examples, read=logits_of) -> Tensor:
    """The negative log-likelihood of every target token, one example at a time, no padding."""
    losses = []
    for example in examples:
        prompt = base.tokenizer(example.input)["input_ids"]
        space = "" if base.is_encoder_decoder else " "
        target = base.tokenizer(space + example.target, add_special_tokens=False)["input_ids"] + [1]
        if base.is_encoder_decoder:
            shifted = torch.tensor([[0, *target[:-1]]])
            logits = read(model, torch.tensor([prompt]), decoder_input_ids=shifted)[0]
        else:
            logits = read(model, torch.tensor([prompt + target]))[0, len(prompt) - 1 : -1]
        losses.append(-logits.float().log_softmax(-1)[range(len(target)), target])
    return torch.cat(losses)


def with_graph(model: nn.Module, ids: Tensor, **inputs: Tensor) -> Tensor:
    """The logits, to be differentiated."""
    return model(ids, **inputs).logits


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


def assert_same_expert(got: Expert, wanted: Expert) -> None:
    """Bit for bit the same adapter and gates."""
    assert (got.directory / ADAPTER).read_bytes() == (wanted.directory / ADAPTER).read_bytes()
    assert got.gates.keys() == wanted.gates.keys()
    assert all(torch.equal(got.gates[site], wanted.gates[site]) for site in wanted.gates)


def on_call(function: str, call: int, action):
    """(module, name, a function in its place that does `action` on its `call`-th call)."""
    module, _, name = function.rpartition(".")
    original, calls = getattr(import_module(module), name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            action()
        return original(*args, **kwargs)

    return import_module(module), name, counted


def interrupt():
    raise KeyboardInterrupt


def interrupted(monkeypatch, base, out: Path, function: str, call: int, **options) -> None:
    """Start a training in `out` that is interrupted in the given call."""
    with monkeypatch.context() as patch:
        patch.setattr(*on_call(function, call, interrupt))
        with pytest.raises(KeyboardInterrupt):
            train(base, out, **options)
    assert not out.exists()


PASS = "phatgoose.training.trainer.target_logits"


def gated_loss(base, expert: Expert, examples) -> float:
    """The loss of the base with the saved expert behind its saved gates."""
    with applied(base.model, expert.modules, GatedLinear) as layers:
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
