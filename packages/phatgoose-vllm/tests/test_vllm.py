"""Routing inside vLLM, against our own model: `make test-engines` (docs/engines.md).

The pool of SmolLM2 is the one that PHATGOOSE_ENGINE_POOL names (`phatgoose demo`'s experts), or
else three experts that are trained here for a few steps. Other architectures are tiny and random.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import phatgoose
from phatgoose.base import load_base, smollm2_folder
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.errors import BaseModelError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, save
from phatgoose.tasks.loading import load_task
from phatgoose.training.train_expert import train_expert
from tiny import write_expert
from vllm_engine import (
    Answers,
    EngineError,
    ask_vllm,
    assert_same,
    our_answers,
    quantised_base,
    tied,
    write_base,
)

POOL = "PHATGOOSE_ENGINE_POOL"
TASKS = Path(phatgoose.__file__).parent / "apps" / "demo_tasks"
UNSEEN = ("hotel_feedback", "evening_classes", "family_papers", "course_places", "village_post")
ROUTERS = ("phatgoose", "average-activation", "arrow", "merged")
PROMPTS, TOKENS = 50, 8
SHARED = 1000  # tokens that two prompts have in common

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="needs vLLM, in .venv-vllm"
    ),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def smollm2():
    try:
        return smollm2_folder()
    except BaseModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def experts(smollm2, tmp_path_factory) -> Path:
    if os.environ.get(POOL):
        return Path(os.environ[POOL])
    folder, base = tmp_path_factory.mktemp("pool"), load_base("smollm2", dtype="float32")
    few = {
        "peft": Lora(rank=16, alpha=16.0),
        "training": Training(steps=8, batch_size=4, eval_examples=4),
        "gate_training": GateTraining(gate_steps=1, statistics_examples=16),
    }
    for name in ("sentiment", "archive", "village"):
        train_expert(base, load_task(TASKS / f"{name}.csv"), out=folder / name, **few)
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_base("smollm2", dtype="float32").tokenizer
    rows = [load_task(TASKS / f"{name}.csv").test[: PROMPTS // len(UNSEEN)] for name in UNSEEN]
    return [tokenizer(row.input)["input_ids"] for task in rows for row in task]


def saved(model: PreTrainedModel, folder: Path) -> Path:
    save(model, folder / "routed")
    return folder / "routed"


@pytest.fixture(scope="module")
def routed_folder(experts, tmp_path_factory) -> Path:
    return saved(our_model(experts), tmp_path_factory.mktemp("saved"))


def our_model(experts: Path, router: str = "phatgoose") -> PreTrainedModel:
    return compose(Pool.open(experts), load_base("smollm2", dtype="float32"), router=router)


@pytest.mark.parametrize("router", ROUTERS)
def test_fifty_prompts_are_answered_as_by_our_own_model(
    router, smollm2, experts, prompts, tmp_path
):
    model = our_model(experts, router)
    (got,) = ask_vllm(tmp_path, smollm2, [prompts], model=saved(model, tmp_path), tokens=TOKENS)
    wanted = our_answers(model, prompts, TOKENS)
    by_rounding = tied(model, prompts, wanted)
    assert len(by_rounding) <= PROMPTS // 10
    assert_same(got, wanted, but=by_rounding)
    base = our_answers(load_base("smollm2", dtype="float32").model, prompts[::5], TOKENS)
    some = Answers(got.tokens[::5], got.logprobs[::5], got.cached[::5])
    with pytest.raises(AssertionError):  # it was routed at all; weak experts may change no token
        assert_same(some, base, 0.01)


def test_requests_share_the_prefix_cache_and_answers_stay_equal(
    smollm2, routed_folder, experts, prompts, tmp_path
):
    """A prefix in chunks of 256 tokens, then prompts that begin with it, and the same uncached."""
    shared = [token for ids in prompts for token in ids][:SHARED]
    asked = [shared + prompts[index] for index in (3, 13, 23, 33)]
    rounds = [[asked[0]], asked[1:]]
    chunked = {"max_num_batched_tokens": 256, "enable_chunked_prefill": True, "max_num_seqs": 8}
    cached = ask_vllm(
        tmp_path, smollm2, rounds, model=routed_folder, tokens=TOKENS, settings=chunked
    )
    whole = {"enable_prefix_caching": False, "max_num_batched_tokens": 4096}
    plain = ask_vllm(tmp_path, smollm2, [asked], model=routed_folder, settings=whole)
    assert cached[0].cached == [0]
    assert min(cached[1].cached) >= SHARED - 200  # in whole blocks
    first, others = cached
    got = Answers(
        first.tokens + others.tokens, first.logprobs + others.logprobs, first.cached + others.cached
    )
    # Of so many tokens some hang on rounding, so that numbers may differ by more than usual.
    assert got.tokens == plain[0].tokens
    assert got.tokens == our_answers(our_model(experts), asked, TOKENS).tokens


# Tiny bases of other architectures, packed otherwise, split and quantised.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function from an architecture to the folder of a tiny base and four experts of it."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            write_base(made[kind] / "base", kind)
            base = load_base(made[kind] / "base", dtype="float32")
            for index in range(4):
                write_expert(base, made[kind], f"e{index}", seed=index, rank=4)
        return made[kind]

    return of


SHORT = [
    torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (5, 17, 40, 64, 33)
]


def tiny_model(folder: Path, router: str = "phatgoose") -> PreTrainedModel:
    base = load_base(folder / "base", dtype="float32")
    return compose(Pool.open(folder / "experts"), base, router=router)


def ask_tiny(folder: Path, tmp_path: Path, router: str = "phatgoose", **how) -> Answers:
    model = saved(tiny_model(folder, router), tmp_path)
    (answers,) = ask_vllm(tmp_path, how.pop("base", folder / "base"), [SHORT], model=model, **how)
    return answers


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "phi3"])
def test_architectures_that_pack_otherwise(kind, tiny, tmp_path):
    """GPT-2's one layer of queries, keys and values; Qwen2's biases; Phi-3's packed layers."""
    assert_same(
        ask_tiny(tiny(kind), tmp_path), our_answers(tiny_model(tiny(kind), "phatgoose"), SHORT)
    )


@pytest.mark.parametrize("router", ["phatgoose", "arrow", "merged"])
def test_two_processes_with_tensor_parallelism(router, tiny, tmp_path):
    """One head of keys, which both hold; a Llama's inputs and outputs are split."""
    two = {"tensor_parallel_size": 2}
    got = ask_tiny(tiny("llama"), tmp_path, router, settings=two, VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert_same(got, our_answers(tiny_model(tiny("llama"), router), SHORT))


def test_compiled_as_vllm_does_by_default(tiny, tmp_path):
    got = ask_tiny(tiny("llama"), tmp_path, settings={"enforce_eager": False})
    assert_same(got, our_answers(tiny_model(tiny("llama"), "phatgoose"), SHORT))


def test_on_a_quantised_base_the_expert_acts_as_on_the_whole_one(tiny, tmp_path):
    """int8 weights and activations: our layer around vLLM's quantised one.

    vLLM 0.32's own LoRA, to which it might be compared, ends with an error on such a base on CPUs.
    """
    folder = tiny("llama")
    quantised = quantised_base(folder / "base", tmp_path / "int8")
    model = tiny_model(folder, "single:expert=e1")
    wanted = our_answers(model, SHORT, 1)
    (got,) = ask_vllm(tmp_path, quantised, [SHORT], model=saved(model, tmp_path), tokens=1)
    (alone,) = ask_vllm(tmp_path, quantised, [SHORT], tokens=1)
    assert far(got, wanted) < far(alone, wanted) / 3


def far(one: Answers, other: Answers) -> float:
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    return sum(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))


# What is refused, before anything is served.


def test_another_base_is_refused_by_its_fingerprint(tiny, tmp_path):
    other = tmp_path / "other"
    write_base(other, "llama", seed=1)
    with pytest.raises(EngineError, match="WrongBaseError: The base of the experts is"):
        ask_tiny(tiny("llama"), tmp_path, base=other)


@pytest.mark.parametrize(
    ("router", "settings", "message"),
    [
        ("discriminant", {}, "reads the whole prompt"),
        ("phatgoose", {"enable_lora": True}, "--enable-lora adds one adapter"),
    ],
)
def test_what_cant_be_is_refused_at_the_start(router, settings, message, tiny, tmp_path):
    with pytest.raises(EngineError, match=message):
        ask_tiny(tiny("llama"), tmp_path, router, settings=settings)
