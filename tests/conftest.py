"""Tiny bases, tokenizers and experts, made from configs: no network, no downloads."""

from __future__ import annotations

import copy
import gc
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before torch is

import pytest
import torch
from hypothesis import HealthCheck, settings
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from phatgoose.base.loading import Base, load_base
from phatgoose.base.sites import find_sites
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.per_input import lookup
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, retrieval_text

# How long an example takes depends on who else is at work.
settings.register_profile("any clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any clock")

VOCABULARY = 300
KINDS = ("llama", "gpt2", "qwen2", "t5")  # qwen2 is the grouped-query model, with biases


def make_tokenizer(*, final_eos: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 bytes and three special tokens; no training, no files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {character: 3 + i for i, character in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if final_eos:
        inner.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model with weights large enough for routing to matter."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    if kind == "llama":
        config = LlamaConfig(**small, **ids, intermediate_size=48, num_attention_heads=4)
        model: PreTrainedModel = LlamaForCausalLM(config)
    elif kind == "qwen2":
        config = Qwen2Config(
            **small, **ids, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
        )
        model = Qwen2ForCausalLM(config)
    elif kind == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, **ids)
        model = GPT2LMHeadModel(config)
    else:
        config = T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
        model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    model.generation_config.pad_token_id = 0
    return model.eval()


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A local folder per kind of tiny base, as a user would have one."""
    folders = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("bases") / kind
        make_model(kind).save_pretrained(folder)
        make_tokenizer(final_eos=kind == "t5").save_pretrained(folder)
        folders[kind] = folder
    return folders


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of base in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def loaded_bases(base_folders: dict[str, Path]) -> dict[str, Base]:
    """Each kind of base, loaded once: to be copied, which is far quicker than loading again."""
    return {kind: load_base(folder, dtype="float32") for kind, folder in base_folders.items()}


@pytest.fixture
def base(kind: str, loaded_bases: dict[str, Base]) -> Base:
    """A fresh base of the current kind, float32."""
    return copy.deepcopy(loaded_bases[kind])


@pytest.fixture
def llama(loaded_bases: dict[str, Base]) -> Base:
    """A fresh tiny Llama, float32, for tests that need one base only."""
    return copy.deepcopy(loaded_bases["llama"])


def make_adapter(
    base: Base, folder: Path, *, rank: int = 4, seed: int = 0, **options: object
) -> Path:
    """A PEFT LoRA adapter of random factors at every site of `base`, written to `folder`."""
    key = repr((base.reference, rank, seed, sorted(options.items())))
    if key not in ADAPTERS:
        _write_by_peft(base, folder, rank, seed, options)
        ADAPTERS[key] = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ADAPTERS[key].items():
        (folder / name).write_bytes(content)
    return folder


ADAPTERS: dict[str, dict[str, bytes]] = {}  # peft's files by what was asked for: it takes its time


def _write_by_peft(
    base: Base, folder: Path, rank: int, seed: int, options: dict[str, object]
) -> None:
    sites = find_sites(base.model)
    conv = isinstance(base.model.get_submodule(next(iter(sites))), Conv1D)
    settings = {
        "task_type": TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(sites),
        "fan_in_fan_out": conv,
        **options,
    }
    fresh = load_base(base.id, dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*lora_bias.*")  # those of layers without any
        model = get_peft_model(fresh.model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*lora_B.bias.*")  # peft looks for matrices
        model.save_pretrained(folder, save_embedding_layers=False)


def write_expert(
    base: Base, folder: Path, name: str, *, seed: int = 0, **options: object
) -> Expert:
    """A random expert of `make_adapter`, gates and means included, written below `folder`."""
    adapter = make_adapter(base, folder / "adapters" / name, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 1000)
    acts = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    sites = {
        site: found.in_features
        for site, found in find_sites(base.model).items()
        if any(site == target or site.endswith(f".{target}") for target in acts)
    }
    gates, means = (
        {site: torch.randn(n, generator=generator) for site, n in sites.items()} for _ in range(2)
    )
    expert = Expert.from_peft(adapter, gates, name=name, means=means, base=base)
    return expert.save(folder / "experts" / name)


MakeExpert = Callable[..., Expert]


@pytest.fixture
def make_expert(tmp_path: Path) -> MakeExpert:
    """A function that writes a random expert: `make_expert(base, name, seed=…, rank=…)`."""
    return lambda base, name, **options: write_expert(base, tmp_path, name, **options)


@pytest.fixture(scope="session")
def pool_of(
    base_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Pool]:
    """`pool_of(kind)`: four random experts, e0 to e3, for that base, made once.

    `ranks` says how many there are, and of what rank each.
    """

    @cache
    def make(kind: str, ranks: tuple[int, ...] = (4, 4, 4, 4)) -> Pool:
        base = load_base(base_folders[kind], dtype="float32")
        folder = tmp_path_factory.mktemp(kind)
        return Pool(
            tuple(
                write_expert(base, folder, f"e{z}", seed=z, rank=rank)
                for z, rank in enumerate(ranks)
            )
        )

    return make


@pytest.fixture
def pool(kind: str, pool_of: Callable[..., Pool]) -> Pool:
    """Four random experts, e0 to e3, for the current base."""
    return pool_of(kind)


@pytest.fixture
def llama_pool(pool_of: Callable[..., Pool]) -> Pool:
    """Four random experts, e0 to e3, for the tiny Llama."""
    return pool_of("llama")


TOPICS = ("apples, pears and plums", "1 + 2 = 3, 4 + 5 = 9", "WHAT? WHO? WHY?", "jazz quiz; zigzag")
SCORES = {  # of the experts e0 to e3: e1 is the best at "first", e2 at "second", e3 on the whole
    "e0": {"first": 0.1, "second": 0.4},
    "e1": {"first": 0.8, "second": 0.1},
    "e2": {"first": 0.0, "second": 0.9},
    "e3": {"first": 0.6, "second": 0.7},
}


def toy_embed(
    texts: Sequence[str], embedder: str = DEFAULT_EMBEDDER, truncation: str = "middle"
) -> torch.Tensor:
    """Unit vectors of a text's bytes, counted [texts, 64]: in place of a sentence embedder."""
    rows = [
        torch.tensor(list(text.encode())).remainder(64).bincount(minlength=64) for text in texts
    ]
    return torch.nn.functional.normalize(torch.stack(rows).float(), dim=-1)


@pytest.fixture
def toy_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`toy_embed` in place of the default sentence embedder."""
    use_toy_embedder(monkeypatch)


def use_toy_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fixture `toy_embedder` does, for longer than a test."""
    monkeypatch.setattr(lookup, "embed_texts", toy_embed)
    monkeypatch.setattr(lookup, "load_embedder", lambda embedder: None)


def with_embeddings(pool: Pool) -> Pool:
    """The pool whose experts have trained on one of TOPICS each: e0 on one input, e1 on two."""
    experts = []
    for z, (expert, topic) in enumerate(zip(pool.experts, TOPICS, strict=False)):
        texts = [retrieval_text(topic * (copies + 1), ()) for copies in range(z + 1)]
        info = replace(expert.info, embedder=DEFAULT_EMBEDDER)
        experts.append(replace(expert, info=info, embeddings=toy_embed(texts)))
    return Pool(tuple(experts))


def compose_by(router: str, pool: Pool, base: Base, **options: object) -> PreTrainedModel:
    """`pool`, of e0 to e3 or fewer, composed by any of ROUTERS with all that this one needs."""
    given: dict[str, object] = {"single": {"expert": pool.names[-1]}}.get(router, {})
    given |= {"scores": SCORES} if router in ("oracle", "best-individual") else {}
    model = compose(with_embeddings(pool), base, router=router, **given | options)
    return of_task(model, "second")


def of_task(model: PreTrainedModel, task: str) -> PreTrainedModel:
    """`model`, told by hand that all inputs to come belong to `task`; router oracle must know."""
    if composition_of(model).lookup is not None:
        composition_of(model).lookup.begin_task(task)
    return model


def make_ids(rows: int = 1, tokens: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids without special ones, [rows, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (rows, tokens), generator=generator)


def logits_of(model: PreTrainedModel, ids: torch.Tensor, **inputs: object) -> torch.Tensor:
    """The logits after `ids`; an encoder-decoder model reads them in encoder and decoder alike."""
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def assert_same_logits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to 2e-5 of the largest logit: float32, magnified by T5's unscaled attention."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def peft_model(base: Base, folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """A fresh copy of `base` under the adapter in `folder`, as PEFT itself loads it."""
    fresh = load_base(base.id, dtype=dtype).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 under transformers 5.24
        warnings.filterwarnings("ignore", message="(?s).*lora_(bias|B.bias).*")
        return PeftModel.from_pretrained(fresh, folder)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads; a second OpenMP pool makes them 100 times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _imported_for_good() -> None:
    """Modules are no garbage: a Trainer looks through all of them each time, 0.2 s for torch's."""
    gc.collect()
    gc.freeze()
