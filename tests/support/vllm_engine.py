"""Engines and bases of the tests: vLLM in a process of its own, and what our own model answers."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from engines import vllm_environment
from paths import ROOT
from phatgoose.routing.compose import composition_of
from tiny import make_tokenizer

ASKING = ROOT / "packages" / "phatgoose-vllm" / "tests" / "ask_vllm.py"
SECONDS = 500  # for an engine to start and answer
TIED = 2e-6  # between affinities, a few times their roundings


@dataclass(frozen=True)
class Answers:
    """What an engine, or ours, answers to prompts: greedy tokens and their log-probabilities."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    cached: list[int | None]


class EngineError(Exception):
    """vLLM ended; the message is all it wrote."""


def ask_vllm(
    folder: Path,
    base: Path,
    rounds: list[list[list[int]]],
    *,
    model: Path | None = None,
    tokens: int = 8,
    settings: dict | None = None,
    **environment: str,
) -> list[Answers]:
    """vLLM's answers to each of the `rounds`, with `model` routed by our plugin if there is one."""
    job, answers = folder / "job.json", folder / "answers.json"
    answers.unlink(missing_ok=True)
    llm = {"max_model_len": 2048, "skip_tokenizer_init": True, **(settings or {})}
    content = {"base": str(base), "rounds": rounds, "tokens": tokens, "llm": llm}
    job.write_text(json.dumps(content))
    ended = subprocess.run(
        [sys.executable, str(ASKING), str(job), str(answers)],
        env=vllm_environment(model, **environment),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if ended.returncode or not answers.exists():
        raise EngineError(ended.stdout + ended.stderr)
    return [
        Answers(*([each[name] for each in found] for name in ("tokens", "logprobs", "cached")))
        for found in json.loads(answers.read_text())
    ]


@torch.no_grad()
def our_answers(model: PreTrainedModel, prompts: list[list[int]], tokens: int = 8) -> Answers:
    """The same of one of our models, prompt by prompt."""
    found = Answers([], [], [])
    for ids in prompts:
        chosen, logprobs, seen, past = [], [], torch.tensor([ids]), None
        for _ in range(tokens):  # past the end of the text, as vLLM is asked to
            read = model(input_ids=seen, past_key_values=past, use_cache=True)
            past, scores = read.past_key_values, read.logits[0, -1].log_softmax(-1)
            chosen.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
            seen = torch.tensor([chosen[-1:]])
        found.tokens.append(chosen)
        found.logprobs.append(logprobs)
        found.cached.append(None)
    return found


def assert_same(
    got: Answers, wanted: Answers, most: float = 1e-4, *, but: frozenset[int] = frozenset()
) -> None:
    """Equal tokens in all, and log-probabilities within `most`; these in all `but` some answers."""
    assert got.tokens == wanted.tokens
    differences = [
        abs(one - other)
        for index, (ours, theirs) in enumerate(zip(got.logprobs, wanted.logprobs, strict=True))
        for one, other in zip(ours, theirs, strict=True)
        if index not in but
    ]
    assert max(differences) <= most


@torch.no_grad()
def tied(model: PreTrainedModel, prompts: list[list[int]], answers: Answers) -> frozenset[int]:
    """The answers of `model` in which rounding decides which expert is the k-th.

    There two programs whose sums are rounded otherwise may choose another expert for a token.
    """
    gaps: list[float] = []

    def look(layer, arguments) -> None:
        router, u = layer.router, arguments[0]
        if router.router.fused and router.k < router.E:
            scores = router.router.scores(u.reshape(-1, u.shape[-1]), router)
            ranked = scores.sort(-1, descending=True).values
            gaps.append(float((ranked[:, router.k - 1] - ranked[:, router.k]).min()))

    layers = composition_of(model).layers.values()
    hooks = [layer.register_forward_pre_hook(look) for layer in layers if hasattr(layer, "router")]
    found = set()
    for index, (ids, tokens) in enumerate(zip(prompts, answers.tokens, strict=True)):
        gaps.clear()
        model(input_ids=torch.tensor([ids + tokens]))
        if gaps and min(gaps) < TIED:
            found.add(index)
    for hook in hooks:
        hook.remove()
    return frozenset(found)


SIZES = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 2048}  # heads of 32, vLLM's smallest
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
GPT2 = {"vocab_size": 320, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 2048}


def write_base(folder: Path, kind: str, seed: int = 0) -> None:
    """A tiny random base in `folder`, of sizes that vLLM's attention takes, with a tokenizer."""
    torch.manual_seed(seed)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **ENDS, num_key_value_heads=1)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **ENDS, num_key_value_heads=2)),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, **ENDS, num_key_value_heads=2)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **ENDS)),
    }
    model = made[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    make_tokenizer(final_eos=False).save_pretrained(folder)


def quantised_base(folder: Path, into: Path) -> Path:
    """The base in `folder` with int8 weights, a scale for each output, as compressed-tensors."""
    into.mkdir()
    for path in folder.iterdir():
        (into / path.name).write_bytes(path.read_bytes())
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".layers." not in name or tensor.dim() != 2:
            tensors[name] = tensor
            continue
        scale = tensor.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (tensor / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((into / "config.json").read_text())
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight, "strategy": "token", "dynamic": True},
            }
        },
    }
    (into / "config.json").write_text(json.dumps(config))
    return into
