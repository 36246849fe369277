"""What each reader's choice costs: processor time beside the base's prefill, and memory.

    python benchmarks/reader_cost.py [--readers e5,minilm,smollm2,gemma,qwen] [--rounds 15]

One thread, each reader in a process of its own, a text of about a hundred tokens: as a whole, and
with the parts that are read where the whole isn't far ahead. The prefill is SmolLM2's, in bfloat16,
of the same text. Printed are medians of rounds, of processor time, and what the process holds more
after the reader is loaded and has read. Gemma and Qwen are of research/bases.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from people_readers import Reader
from phatgoose.base.loading import load_base
from phatgoose.names import SMOLLM2
from phatgoose.reader import open_reader
from phatgoose.routing.conversation import Views

TEXT = (
    "Hi there, I hope you are doing well today. I have been looking at the quarterly report that "
    "our finance team put together last week. It is rather long and nobody on the board has the "
    "time to read it whole. Could you please write a short summary of the main points for me? It "
    "should mention revenue, costs and the outlook for next year. Please keep the tone neutral and "
    "avoid any jargon. Thank you so much for your help with this!"
)
OF_BASES = ("gemma", "qwen")  # not on PyPI under their own names


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """The median of processor times of `work`, after one that doesn't count."""
    work()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        times.append(1000 * (time.process_time() - started))
    return median(times)


def resident() -> float:
    """What this process holds, in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


def of_reader(name: str, rounds: int) -> str:
    before = resident()
    reader = Reader.of(name) if name in OF_BASES else open_reader(name)
    read = reader.read if isinstance(reader, Reader) else reader.states
    views = Views.of(TEXT)
    every = [*views.wholes, *views.parts]
    whole = milliseconds(lambda: read([TEXT]), rounds)
    with_parts = milliseconds(lambda: read(every), rounds)
    held = resident() - before
    return f"{name}\t{whole:.1f}\t{with_parts:.1f}\t{held:.0f}"


def prefill(rounds: int) -> float:
    base = load_base(SMOLLM2, dtype="bfloat16")
    ids = torch.tensor([base.tokenizer(TEXT)["input_ids"]])
    with torch.inference_mode():
        return milliseconds(
            lambda: base.model(input_ids=ids, use_cache=True, logits_to_keep=1), rounds
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--readers", default="e5,minilm,smollm2,gemma,qwen")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a child's reader
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only:
        print(of_reader(given.only, given.rounds))
        return
    prefilled = prefill(given.rounds)
    print(f"SmolLM2's prefill: {prefilled:.1f} ms")
    print("| reader | whole, ms | with parts, ms | of the prefill | MB |\n|---|---|---|---|---|")
    for name in given.readers.split(","):
        options = ["--only", name, "--rounds", str(given.rounds)]
        command = [sys.executable, __file__, *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        reader, whole, parts, held = done.stdout.strip().splitlines()[-1].split("\t")
        shares = f"{float(whole) / prefilled:.2f}, {float(parts) / prefilled:.2f}"
        print(f"| {reader} | {whole} | {parts} | {shares} | {held} |", flush=True)


if __name__ == "__main__":
    main()
