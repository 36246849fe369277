"""Routing inside vLLM, against our own model: `make test-engines` (docs/engines.md).

The pool of SmolLM2 is the one that PHATGOOSE_ENGINE_POOL names (`phatgoose demo`'s experts), or
else three experts that are trained here for a few steps. Other architectures are tiny and random.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engines import PROMPTS, engine_pool, engine_prompts, vllm_environment
from phatgoose.base.loading import load_base
from phatgoose.base.smollm2 import smollm2_folder
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, save
from tiny import make_tokenizer, write_expert

ASKING = Path(__file__).with_name("ask_vllm.py")
TOKENS = 8
SHARED = 1000  # tokens that two prompts have in common
TIED = 2e-6  # between affinities, a few times their roundings

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="needs vLLM, in .venv-vllm"
    ),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def ask(tmp_path):
    """vLLM's answers to each of some rounds, with `model` routed by our plugin if there is one.

    Answers are (tokens, log-probabilities, how many tokens were cached).
    """

    def asked(base, *rounds, model=None, tokens=TOKENS, environment=(), **llm):
        job, answers, folder = (tmp_path / name for name in ("job.json", "answers.json", "routed"))
        if model is not None:
            save(model, folder, overwrite=True)
        llm = {"max_model_len": 2048, "enforce_eager": True, **llm}
        content = {"base": str(base), "rounds": rounds, "tokens": tokens, "llm": llm}
        job.write_text(json.dumps(content))
        ended = subprocess.run(
            [sys.executable, ASKING, job, answers],
            env=vllm_environment(folder if model is not None else None, **dict(environment)),
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return json.loads(answers.read_text())

    return asked


@torch.no_grad()
def ours(model, prompts, tokens=TOKENS):
    """The same of one of our models, prompt by prompt."""
    answers = []
    for ids in prompts:
        chosen, logprobs, seen, past = [], [], torch.tensor([ids]), None
        for _ in range(tokens):  # past the end of the text, as vLLM is asked to
            read = model(input_ids=seen, past_key_values=past, use_cache=True)
            past, scores = read.past_key_values, read.logits[0, -1].log_softmax(-1)
            chosen.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
            seen = torch.tensor([chosen[-1:]])
        answers.append((chosen, logprobs, None))
    return answers


def tokens_of(answers):
    return [tokens for tokens, _, _ in answers]


def distances(answers, others):
    """How far each answer's log-probabilities are from the other's, at most."""
    pairs = zip(answers, others, strict=True)
    return [
        max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
        for (_, mine, _), (_, theirs, _) in pairs
    ]


def assert_same(answers, wanted):
    assert tokens_of(answers) == tokens_of(wanted)
    assert max(distances(answers, wanted)) <= 1e-4


@torch.no_grad()
def is_tied(model, ids):
    """Whether rounding decides which expert is the k-th for a token.

    There two programs whose sums are rounded otherwise may choose another expert.
    """
    gaps = []

    def look(layer, arguments):
        at_site, u = layer.at_site, arguments[0]
        if at_site.router.fused and at_site.k < at_site.E:
            scores = at_site.router.scores(u.reshape(-1, u.shape[-1]), at_site)
            ranked = scores.sort(-1, descending=True).values
            gaps.append(float((ranked[:, at_site.k - 1] - ranked[:, at_site.k]).min()))

    layers = composition_of(model).layers.values()
    hooks = [layer.register_forward_pre_hook(look) for layer in layers if hasattr(layer, "router")]
    model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return min(gaps, default=1) < TIED


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return engine_pool(tmp_path_factory)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_base("smollm2", dtype="float32").tokenizer
    return [tokenizer(prompt)["input_ids"] for prompt in engine_prompts()]


def our_model(experts, router="phatgoose"):
    return compose(Pool.open(experts), load_base("smollm2", dtype="float32"), router=router)


@pytest.mark.parametrize("router", ["phatgoose", "average-activation", "arrow", "merged"])
def test_fifty_prompts_are_answered_as_by_our_own_model(router, experts, prompts, ask):
    model, base = our_model(experts, router), load_base("smollm2", dtype="float32").model
    (answers,) = ask(smollm2_folder(), prompts, model=model)
    wanted = ours(model, prompts)
    assert tokens_of(answers) == tokens_of(wanted)
    far = [n for n, distance in enumerate(distances(answers, wanted)) if distance > 1e-4]
    assert len(far) <= PROMPTS // 10
    assert all(is_tied(model, prompts[n] + wanted[n][0]) for n in far)
    some, alone = answers[::5], ours(base, prompts[::5])  # weak experts may change no token
    assert tokens_of(some) != tokens_of(alone) or max(distances(some, alone)) > 0.01


def test_requests_share_the_prefix_cache_and_answers_stay_equal(experts, prompts, ask):
    """A prefix in chunks of 256 tokens, then prompts that begin with it, and the same uncached."""
    shared = [token for ids in prompts for token in ids][:SHARED]
    first, *others = asked = [shared + prompts[index] for index in (3, 13, 23, 33)]
    model, folder = our_model(experts), smollm2_folder()
    chunked = {"max_num_batched_tokens": 256, "enable_chunked_prefill": True, "max_num_seqs": 8}
    one, more = ask(folder, [first], others, model=model, **chunked)
    whole = {"enable_prefix_caching": False, "max_num_batched_tokens": 4096}
    (plain,) = ask(folder, asked, model=model, **whole)
    assert one[0][2] == 0
    assert min(cached for _, _, cached in more) >= SHARED - 200  # in whole blocks
    # Of so many tokens some hang on rounding, so that numbers may differ by more than usual.
    assert tokens_of(one + more) == tokens_of(plain) == tokens_of(ours(model, asked))


# Tiny bases of other architectures, packed otherwise, split and quantised.

IDS = {"vocab_size": 320, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
LLAMA = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 2048}  # heads of 32, vLLM's smallest
SIZES = {
    "llama": LLAMA | {"num_key_value_heads": 1},
    "qwen2": LLAMA | {"num_key_value_heads": 2},
    "phi3": LLAMA | {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 2048},
}
SHORT = [
    torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (5, 17, 40, 64, 33)
]


def write_base(folder, kind, seed=0):
    """A tiny random base in `folder`, of sizes that vLLM's attention takes, with a tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **IDS, **SIZES[kind]))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    make_tokenizer(final_eos=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function from an architecture to the folder of a tiny base, and of four experts of it."""

    @cache
    def made(kind):
        folder = tmp_path_factory.mktemp(kind)
        base = load_base(write_base(folder / "base", kind), dtype="float32")
        for index in range(4):
            write_expert(base, folder, f"e{index}", seed=index, rank=4)
        return folder / "base", folder / "experts"

    return made


@pytest.fixture
def compared(tiny, ask):
    """vLLM's answers with a tiny model, and ours."""

    def answers(kind, router="phatgoose", base=None, tokens=TOKENS, **how):
        folder, experts = tiny(kind)
        model = compose(Pool.open(experts), load_base(folder, dtype="float32"), router=router)
        (got,) = ask(base or folder, SHORT, model=model, tokens=tokens, **how)
        return got, ours(model, SHORT, tokens)

    return answers


TWO = {"tensor_parallel_size": 2, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}


@pytest.mark.parametrize(
    ("kind", "router", "how"),
    [
        ("gpt2", "phatgoose", {}),  # one layer of queries, keys and values
        ("qwen2", "phatgoose", {}),  # biases
        ("phi3", "phatgoose", {}),  # packed layers
        # Two processes. Both hold the one head of keys; a Llama's inputs and outputs are split.
        *(("llama", router, TWO) for router in ("phatgoose", "merged")),
        ("llama", "phatgoose", {"enforce_eager": False}),  # compiled, as vLLM does by default
    ],
)
def test_architectures_that_pack_otherwise_splits_and_compilation(compared, kind, router, how):
    assert_same(*compared(kind, router, **how))


def quantised_base(folder, into):
    """The base in `folder` with int8 weights, a scale for each output, as compressed-tensors."""
    shutil.copytree(folder, into)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if ".layers." in name and tensor.dim() == 2:
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = {**eight, "strategy": "channel", "dynamic": False}
    inputs = {**eight, "strategy": "token", "dynamic": True}
    linear = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = json.loads((into / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": linear},
    }
    (into / "config.json").write_text(json.dumps(config))
    return into


def test_on_a_quantised_base_the_expert_acts_as_on_the_whole_one(compared, tiny, ask, tmp_path):
    """int8 weights and activations: our layer around vLLM's quantised one.

    What int8 alone changes in the base's answers differs between processors, so it is measured.
    vLLM 0.32's own LoRA, to which it might be compared, ends with an error on such a base on CPUs.
    """
    whole = tiny("llama")[0]
    base = quantised_base(whole, tmp_path / "int8")
    (alone,), (exact,) = (ask(each, SHORT, tokens=1) for each in (base, whole))
    routed, wanted = compared("llama", "single:expert=e1", base=base, tokens=1)
    lost, missing = sum(distances(alone, exact)), sum(distances(alone, wanted))
    assert sum(distances(routed, wanted)) < 1.5 * lost < missing


@pytest.mark.parametrize(
    ("router", "how", "message"),
    [
        ("phatgoose", {"base": "other"}, "WrongBaseError: The base of the experts is"),
        ("discriminant", {}, "reads the whole prompt"),
        ("arrow", TWO, "Router arrow reads all inputs of a layer"),
        ("phatgoose", {"enable_lora": True}, "--enable-lora adds one adapter"),
    ],
)
def test_what_cant_be_is_refused_at_the_start(compared, router, how, message, tmp_path):
    if "base" in how:
        how = {"base": write_base(tmp_path / "other", "llama", seed=1)}
    with pytest.raises(AssertionError, match=message):
        compared("llama", router, **how)
