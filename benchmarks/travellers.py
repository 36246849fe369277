"""How many files of ours six travellers cross, and how often a reader of their way turns back.

    python benchmarks/travellers.py [name ...]

A file is crossed where one of its functions runs between the call and its end (importing is none).
Calls from one file into another count once, however many they are; they are a turn back where the
other file was entered before from elsewhere. Everything is tiny and random.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import pytest
import torch

import phatgoose
from phatgoose.base.loading import Base, load_base
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.training.train_expert import train_expert
from routed_models import with_embeddings
from tiny import make_model, make_tokenizer, write_expert
from toy_embedders import use_toy_embedder

SOURCE = str(Path(phatgoose.__file__).parent) + os.sep
Journey = Callable[[], Any]


class Trace:
    """The files that were crossed, in order, and the turns back, while it is `on`."""

    on = False

    def begin(self) -> None:
        """Forget what was noted, and go on."""
        self.files: list[str] = []
        self.turns_back: list[str] = []
        self._calls: set[tuple[str, str]] = set()
        self.on = True

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Note a call; Python's profilers are called so."""
        code = frame.f_code
        if not self.on or event != "call" or not code.co_filename.startswith(SOURCE):
            return
        back = frame.f_back
        while back is not None and not back.f_code.co_filename.startswith(SOURCE):
            back = back.f_back  # through torch, transformers or starlette
        caller = back.f_code.co_filename.removeprefix(SOURCE) if back else ""
        file = code.co_filename.removeprefix(SOURCE)
        if file == caller or (caller, file) in self._calls:
            return
        self._calls.add((caller, file))
        if file in self.files:
            self.turns_back.append(f"{caller} -> {file} ({code.co_name})")
        else:
            self.files.append(file)


def pool_in(folder: Path, base: Base) -> Pool:
    """Four experts with gates, readings and embeddings."""
    return with_embeddings(
        Pool(tuple(write_expert(base, folder, f"e{seed}", seed=seed) for seed in range(4)))
    )


@contextmanager
def activation(folder: Path, base: Base) -> Iterator[Journey]:
    """An activation through `RoutedLinear.forward`."""
    model = compose(pool_in(folder, base), base, router="phatgoose")
    layer = next(iter(model.phatgoose.layers.values()))
    u = torch.randn(3, layer.in_features)
    yield lambda: layer(u)


@contextmanager
def composing(folder: Path, base: Base) -> Iterator[Journey]:
    """`compose(pool)`, from a folder of experts and a base that is loaded."""
    pool_in(folder, base)

    def journey() -> None:
        compose(folder / "experts", base, router="phatgoose")

    journey()
    detach(base.model)
    yield journey


@contextmanager
def prompt(folder: Path, base: Base) -> Iterator[Journey]:
    """A prompt under joint-discriminant: one pass of the routed model."""
    with pytest.MonkeyPatch.context() as patch:
        use_toy_embedder(patch)
        model = compose(pool_in(folder, base), base, router="joint-discriminant")
        yield lambda: model(torch.tensor([base.tokenizer("What is it?")["input_ids"]]))


@contextmanager
def training(folder: Path, base: Base) -> Iterator[Journey]:
    """`train_expert(base, task)`: a file of examples, a loaded base; adapter, gates, statistics."""
    task = folder / "echo.jsonl"
    rows = [{"input": f"say {word}", "target": word} for word in "abcdefgh"]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = iter(range(9))

    def journey() -> None:
        train_expert(
            base,
            task,
            out=folder / f"new{next(places)}",
            peft=Lora(rank=2),
            training=Training(steps=4, batch_size=4, micro_batch_size=2, eval_every=2),
            gate_training=GateTraining(gate_steps=2),
        )

    journey()
    yield journey


@contextmanager
def request(folder: Path, base: Base) -> Iterator[Journey]:
    """One HTTP request: a chat completion of four tokens."""
    from serving import app_of, client_of

    with client_of(app_of(pool_in(folder, base))) as client:
        ask = {"model": "goose", "prompt": "What is it?", "max_tokens": 4}

        def journey() -> None:
            answer = client.post("/v1/completions", json=ask)
            assert answer.status_code == 200, answer.text

        journey()
        yield journey


TRAVELLERS = {
    "activation": activation,
    "compose": composing,
    "prompt": prompt,
    "train": training,
    "request": request,
}


def main() -> None:
    """Send each traveller on its way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(TRAVELLERS))
    parser.add_argument("--list", action="store_true", help="name files and turns, too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    trace = Trace()
    threading.setprofile(trace)
    sys.setprofile(trace)
    print("| traveller | files it crosses | turns back |\n|---|---|---|")
    for name in options.names or TRAVELLERS:
        with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
            folder = Path(place)
            make_tokenizer(final_eos=False).save_pretrained(folder / "base")
            make_model("llama").save_pretrained(folder / "base")
            base = load_base(folder / "base", dtype="float32")
            journey = stack.enter_context(TRAVELLERS[name](folder, base))
            trace.begin()
            journey()
            trace.on = False
        what = (TRAVELLERS[name].__doc__ or "").partition(":")[0].rstrip(".")
        print(f"| {what} | {len(trace.files)} | {len(trace.turns_back)} |")
        if options.list:
            print("", *trace.files, "", *trace.turns_back, "", sep="\n    ")
    print("| a reader looking for the top-k equation | 1 (routing/routers/phatgoose.py) | |")


if __name__ == "__main__":
    main()
