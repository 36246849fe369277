"""What a transformers user does with a model, on many architectures, against the oracle.

Each cell of the matrix does the same with a routed model and with its base under hooks that add the
formula at every site (`oracle.naively_routed`). docs/compatibility.md says so in words.
"""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from architectures import ARCHITECTURES, Tiny, tiny_of
from oracle import naively_routed
from tiny import make_ids

NEW = 3  # tokens to generate
Run = Callable[[PreTrainedModel, Tiny], list[Tensor]]
BOTH = ("padded", None)  # one pass with padding, one without


def usual_side(model: PreTrainedModel) -> str:
    return "right" if model.config.is_encoder_decoder else "left"


def batch(model: PreTrainedModel, side: str | None = "padded") -> dict[str, Tensor]:
    """Two rows of seven tokens; three of the second are padding, at a side, where one is named."""
    ids = make_ids(rows=2)
    mask = torch.ones_like(ids)
    if side is not None:
        side = usual_side(model) if side == "padded" else side
        mask[1, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> list[Tensor]:
    """The logits of each step and the tokens of a generation."""
    torch.manual_seed(0)
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    found = model.generate(**inputs, **length, **(settings | options))
    return [*found.logits, found.sequences]


def generates(side: str | None = "padded", **options: Any) -> Run:
    return lambda model, _: generated(model, batch(model, side), **options)


def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits of one pass at the tokens that are not padding; the decoder reads them too."""
    mask = inputs["attention_mask"]
    if model.config.is_encoder_decoder:
        decoder = {"decoder_input_ids": inputs["input_ids"], "decoder_attention_mask": mask}
        inputs = {**inputs, **decoder}
    found: Tensor = model(**inputs, use_cache=False).logits
    return found[mask.bool()]


@torch.no_grad()
def passed(model: Any, *sides: str | None) -> list[Tensor]:
    """`logits` of a `batch` of each of these sides, without gradients."""
    return [logits(model, batch(model, side)) for side in sides]


def assisted(model: PreTrainedModel, tiny: Tiny) -> list[Tensor]:
    one = {name: part[:1] for name, part in batch(model, None).items()}
    return generated(model, one, assistant_model=tiny.assistant)


def continuous(model: PreTrainedModel, _: Tiny) -> list[Tensor]:
    prompts = [
        row[:length].tolist() for row, length in zip(make_ids(rows=3), (7, 4, 5), strict=True)
    ]
    found = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=4, max_batch_tokens=32, page_size=16
        ),
        warmup=False,
    )
    answers = [found[name] for name in sorted(found)]
    assert not any(answer.error for answer in answers)
    return [torch.tensor([answer.generated_tokens for answer in answers])]


def padded_left(model: PreTrainedModel, _: Tiny) -> list[Tensor]:
    return [*passed(model, "left"), *generated(model, batch(model, "left"))]


def embedded(model: PreTrainedModel, _: Tiny) -> list[Tensor]:
    inputs = batch(model)
    with torch.no_grad():
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    return generated(model, inputs)


def copied(model: PreTrainedModel, _: Tiny) -> list[Tensor]:
    """A copy and its original, in turns."""
    other = copy.deepcopy(model)
    return [*passed(model, "padded"), *passed(other, None)]


def threaded(model: PreTrainedModel, _: Tiny) -> list[Tensor]:
    """Padded passes in one thread, others without padding in another."""
    with ThreadPoolExecutor(len(BOTH)) as pool:
        found = pool.map(lambda side: passed(model, *[side] * 4), BOTH)
    return [each for passes in found for each in passes]


def compiled(model: PreTrainedModel, _: Tiny) -> list[Tensor]:
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, about Bloom's own GELU
        return passed(graph, *BOTH)


def gradients(model: PreTrainedModel, _: Tiny) -> list[Tensor]:
    """The gradient of the embeddings after two passes of different padding."""
    model.train()
    try:
        model.zero_grad()
        outputs = [logits(model, batch(model, side)) for side in BOTH]
        sum(output.square().mean() for output in outputs).backward()
        return [model.get_input_embeddings().weight.grad]
    finally:
        model.zero_grad()
        model.eval()


def checkpointed(model: PreTrainedModel, tiny: Tiny) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the name, which v6 changes
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            return gradients(model, tiny)
        finally:
            model.gradient_checkpointing_disable()


@dataclass(frozen=True)
class Operation:
    """`run` on a routed model should give what `plainly` (None: the same) does on the oracle.

    The fast suite tries it on the architectures `quickly`, -m heavy on the others, where bases can
    do it by themselves. (test_compile.py compiles some.)
    """

    run: Run
    plainly: Run | None = None
    quickly: Collection[str] = tuple(ARCHITECTURES)
    on: Collection[str] = tuple(ARCHITECTURES)


# By the base itself; of others transformers' message is unclear.
BATCHED = set(ARCHITECTURES) - {"gpt_neox", "opt", "bloom", "falcon", "stablelm"}
BATCHED -= {"t5", "bart", "pegasus"}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 0.95}
STATIC = {"cache_implementation": "static", "disable_compile": True}
OPERATIONS = {
    "greedy": Operation(generates(None)),
    "sampling": Operation(generates(None, **SAMPLED), quickly=("llama", "gpt2", "t5")),
    "beams": Operation(generates(num_beams=3)),
    "assisted": Operation(assisted),
    "static cache": Operation(generates(**STATIC)),
    "continuous batching": Operation(continuous, quickly=("llama", "gpt2"), on=BATCHED),
    "left padding": Operation(padded_left),
    "right padding": Operation(lambda model, _: passed(model, "right")),
    "inputs_embeds": Operation(embedded),
    "deep copy": Operation(copied),
    "two threads": Operation(threaded),
    "torch.compile": Operation(compiled, lambda model, _: passed(model, *BOTH), quickly=()),
    "checkpointing": Operation(checkpointed, gradients),
}
CELLS = [
    pytest.param(
        architecture, name, marks=pytest.mark.heavy if architecture not in operation.quickly else ()
    )
    for architecture in ARCHITECTURES
    for name, operation in OPERATIONS.items()
    if architecture in operation.on
]


@pytest.mark.parametrize(("architecture", "name"), CELLS)
def test_a_routed_model_does_what_its_base_does(architecture, name):
    tiny, operation = tiny_of(architecture), OPERATIONS[name]
    with naively_routed(tiny.base, tiny.pool.experts, k=2):
        wanted = (operation.plainly or operation.run)(tiny.base, tiny)
    got = operation.run(tiny.routed, tiny)
    for one, other in zip(got, wanted, strict=True):
        slack = 1e-4 * float(other.abs().max()) if other.is_floating_point() else 0
        torch.testing.assert_close(one, other, rtol=0, atol=slack)
