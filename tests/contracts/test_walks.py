"""Walks through the source enter at most so many of our files as budget.toml allows.

A file is entered where one of its functions runs during the second of two equal calls, in any
thread.
"""

from __future__ import annotations

import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import phatgoose
from paths import ROOT
from phatgoose.config import GateTraining, Lora, Training
from phatgoose.routing.compose import compose, detach
from phatgoose.tasks.loading import load_task
from phatgoose.training.train_expert import train_expert
from serving import CHAT, CHATS, app_of, ask, client_of

SOURCE = f"{Path(phatgoose.__file__).parent}/"
BUDGET = tomllib.loads((ROOT / "budget.toml").read_text(encoding="utf-8"))["walks"]
ECHO = [{"input": f"say {word}", "target": word} for word in "abcdefgh"]


@contextmanager
def noting(files: set[str]) -> Iterator[None]:
    """The files of ours that are entered go to `files`; threads must begin inside."""

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            files.add(frame.f_code.co_filename.removeprefix(SOURCE))

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(before)


def walked(name: str, files: set[str], walk: Callable[[], Any]) -> None:
    walk()  # what is done once is no part of the way
    files.clear()
    walk()
    assert len(files) <= BUDGET[name][0], sorted(files)


def test_a_forward_pass_of_a_layer(llama, llama_pool):
    model, files = compose(llama_pool, llama, router="phatgoose"), set[str]()
    layer = next(iter(model.phatgoose.layers.values()))
    with noting(files):
        walked("forward", files, lambda: layer(torch.ones(3, layer.in_features)))


def test_composing_a_folder_of_experts(llama, llama_pool):
    folder, files = llama_pool.experts[0].directory.parent, set[str]()

    def walk() -> None:
        detach(compose(folder, llama, router="phatgoose"))

    with noting(files):
        walked("compose", files, walk)


def test_training_an_expert_its_gates_and_statistics(llama, tmp_path):
    task, places, files = load_task(ECHO, name="echo"), iter(range(2)), set[str]()

    def walk() -> None:
        train_expert(
            llama,
            task,
            out=tmp_path / f"new{next(places)}",
            peft=Lora(rank=2),
            training=Training(steps=2, batch_size=4, micro_batch_size=2, eval_every=2),
            gate_training=GateTraining(gate_steps=2),
        )

    with noting(files):
        walked("training", files, walk)


def test_a_request_for_a_chat(llama_pool):
    files = set[str]()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with noting(files), client_of(app_of(llama_pool, template=template)) as client:
        walked("chat request", files, lambda: ask(client, path=CHATS, **CHAT))
