"""Tiny bases, tokenizers, experts and their logits: random weights, no network."""

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from phatgoose.base.identity import Base, BaseReference
from phatgoose.base.loading import load_base
from phatgoose.experts.adapter_files import ADAPTER_WEIGHTS
from phatgoose.experts.expert import Expert
from phatgoose.experts.statistics import prompt_statistics_of
from phatgoose.reader import Reader, ReaderReference, open_reader
from phatgoose.sites import find_sites

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


IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
SETTINGS = {
    "llama": LLAMA | {"intermediate_size": 48},
    "qwen2": LLAMA | {"intermediate_size": 48, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1},
    "t5": T5 | {"tie_word_embeddings": False},
}


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model with weights large enough for routing to matter."""
    return random_model(kind, IDS | SETTINGS[kind], seed)


def random_model(kind: str, settings: Mapping[str, object], seed: int = 0) -> PreTrainedModel:
    """A random model of any of transformers' kinds."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    model.generation_config.pad_token_id = 0
    return model.eval()


@cache
def _loaded(base: str, dtype: str) -> PreTrainedModel:
    """A model to copy, which is far quicker than loading."""
    return load_base(base, dtype=dtype).model


# What PEFT, which takes its time, wrote for what it was asked: its files, its tensors, and those of
# them to be drawn, in this order.
ADAPTERS: dict[str, tuple[dict[str, bytes], dict[str, torch.Tensor], list[str]]] = {}


def make_adapter(
    base: Base, folder: Path, *, rank: int = 4, seed: int = 0, **options: object
) -> Path:
    """A PEFT LoRA adapter of random factors at every site of `base`, written to `folder`."""
    key = repr((base.reference, rank, sorted(options.items())))
    if key not in ADAPTERS:
        ADAPTERS[key] = _written_by_peft(base, folder, rank, options)
    files, tensors, names = ADAPTERS[key]
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(tensors[name].shape, generator=generator) * 0.2 for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    save_file(tensors | drawn, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return folder


def _written_by_peft(
    base: Base, folder: Path, rank: int, options: dict[str, object]
) -> tuple[dict[str, bytes], dict[str, torch.Tensor], list[str]]:
    sites = find_sites(base.model)
    settings = {
        "task_type": TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(sites),
        "fan_in_fan_out": isinstance(base.model.get_submodule(next(iter(sites))), Conv1D),
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*lora_bias.*")  # those of layers without any
        model = get_peft_model(copy.deepcopy(_loaded(base.id, "float32")), LoraConfig(**settings))
        warnings.filterwarnings("ignore", message="(?s).*lora_B.bias.*")  # peft looks for matrices
        model.save_pretrained(folder, save_embedding_layers=False)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    names = [name.replace(".default", "") for name, _ in model.named_parameters()]
    (folder / ADAPTER_WEIGHTS).unlink()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files, tensors, [name for name in names if "lora_" in name and name in tensors]


def write_expert(
    base: Base,
    folder: Path,
    name: str,
    *,
    seed: int = 0,
    make: Callable[..., Path] | None = None,
    **options: object,
) -> Expert:
    """A random expert with all statistics but embeddings, below `folder`.

    Its adapter is one of `make_adapter`, or what `make` writes.
    """
    adapter = (make or make_adapter)(base, folder / "adapters" / name, seed=seed, **options)
    bare = Expert.from_peft(adapter, {}, name=name, base=base)
    generator = torch.Generator().manual_seed(seed + 1000)
    sites = find_sites(base.model)
    acting = bare.modules if make else [site for site in sites if site in bare.modules]
    gates, means = (
        {site: torch.randn(sites[site].in_features, generator=generator) for site in acting}
        for _ in range(2)
    )
    states = torch.randn((5, 1, 384), generator=generator)
    told = {"reader": small_reader().reference, "prompts_read": 5}
    shared = {"means": means, "prompt_statistics": prompt_statistics_of(states), **told}
    expert = Expert.from_peft(adapter, gates, name=name, base=base, **shared)
    return expert.save(folder / "experts" / name)


@cache
def small_reader() -> Reader:
    """A reader of one block, that is loaded on a record's word."""
    return open_reader(ReaderReference("minilm", 1, 1))


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 under transformers 5.24
        warnings.filterwarnings("ignore", message="(?s).*lora_(bias|B.bias).*")
        return PeftModel.from_pretrained(copy.deepcopy(_loaded(base.id, dtype)), folder)


def with_added(before: list[str], after: list[str]) -> PreTrainedTokenizerFast:
    """The tests' tokenizer, which adds these special tokens before and after every text."""
    inner = make_tokenizer(final_eos=False)._tokenizer
    inner.add_special_tokens([*before, *after])
    template = " ".join([*before, "$A", *after])
    ids = [(token, inner.token_to_id(token)) for token in dict.fromkeys([*before, *after])]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TINY_BASE = BaseReference("tiny", None, "sha256:ab")
