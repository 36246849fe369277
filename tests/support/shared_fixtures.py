"""Tiny bases, tokenizers and experts, made from configs: no network, no downloads."""

from __future__ import annotations

import gc
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from command_line import Outcome, open_row, review, run, write_rows
from copies import Original
from fake_hub import FakeHub, serving_hub, use_hub
from growth_cases import uneven_pool
from links import KEPT
from mixed_experts import mixed_pool_for
from paths import GOLDEN
from phatgoose.base.loading import Base, load_base
from phatgoose.base.smollm2 import smollm2_folder
from phatgoose.errors import BaseModelError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.tasks.suites.entries import Sources
from phatgoose.tasks.suites.registry import TrainingTask, open_tasks
from routed_models import with_embeddings
from suite_data import write_hub
from tiny import (
    KINDS,
    TINY_BASE,
    make_adapter,
    make_model,
    make_tokenizer,
    write_expert,
)
from toy_embedders import use_toy_embedder

# How long an example takes depends on who else is at work.
settings.register_profile("any clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any clock")


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A local folder per kind of tiny base, as a user would have one."""
    folders = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("bases") / kind
        make_model(kind).save_pretrained(folder)
        make_tokenizer(final_eos=kind == "t5").save_pretrained(folder)
        folders[kind] = folder
    return folders


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of base in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def loaded_bases(base_folders: dict[str, Path]) -> dict[str, Base]:
    """Each kind of base, loaded once: to be copied, which is far quicker than loading again."""
    return {kind: load_base(folder, dtype="float32") for kind, folder in base_folders.items()}


@pytest.fixture(scope="session")
def originals(loaded_bases: dict[str, Base]) -> dict[str, Original[Base]]:
    """Each kind of base, to be copied."""
    return {kind: Original(base) for kind, base in loaded_bases.items()}


@pytest.fixture
def base(kind: str, originals: dict[str, Original[Base]]) -> Base:
    """A fresh base of the current kind, float32."""
    return originals[kind].copied()


@pytest.fixture
def llama(originals: dict[str, Original[Base]]) -> Base:
    """A fresh tiny Llama, float32, for tests that need one base only."""
    return originals["llama"].copied()


@pytest.fixture(scope="session")
def _converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the embedded base where its packages are there: converted once a run.

    transformers reads the whole file three times, and makes the table of names for each layer.
    """
    own = tmp_path_factory.getbasetemp()
    cache = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "converted"
    cache.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, FileLock(cache / "lock"):
        patch.setenv("XDG_CACHE_HOME", str(cache))
        with suppress(ImportError):
            import gguf

            for name in ("GGUFReader", "get_tensor_name_map"):
                patch.setattr(gguf, name, lru_cache(1)(getattr(gguf, name)))
        with suppress(BaseModelError):
            smollm2_folder()
    return cache


@pytest.fixture
def smollm2_cache(_converted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of `_converted`, as the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(_converted))
    return _converted


MakeExpert = Callable[..., Expert]


@pytest.fixture
def make_expert(tmp_path: Path) -> MakeExpert:
    """A function that writes a random expert: `make_expert(base, name, seed=…, rank=…)`."""
    return lambda base, name, **options: write_expert(base, tmp_path, name, **options)


@pytest.fixture(scope="session")
def pool_of(
    loaded_bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Pool]:
    """`pool_of(kind)`: four random experts, e0 to e3, for that base, made once.

    `ranks` says how many there are, and of what rank each.
    """

    @cache
    def make(kind: str, ranks: tuple[int, ...] = (4, 4, 4, 4)) -> Pool:
        folder = tmp_path_factory.mktemp(kind)
        return Pool(
            tuple(
                write_expert(loaded_bases[kind], folder, f"e{z}", seed=z, rank=rank)
                for z, rank in enumerate(ranks)
            )
        )

    return make


@pytest.fixture
def pool(kind: str, pool_of: Callable[..., Pool]) -> Pool:
    """Four random experts, e0 to e3, for the current base."""
    return pool_of(kind)


@pytest.fixture
def llama_pool(pool_of: Callable[..., Pool]) -> Pool:
    """Four random experts, e0 to e3, for the tiny Llama."""
    return pool_of("llama")


@pytest.fixture(scope="session")
def adapters(
    loaded_bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Adapters of three ranks; the one of rank 2 acts on queries only."""
    base, folder = loaded_bases["llama"], tmp_path_factory.mktemp("adapters")
    return {
        "four": make_adapter(base, folder / "four", rank=4, seed=1),
        "six": make_adapter(base, folder / "six", rank=6, seed=2, use_rslora=True),
        "two": make_adapter(base, folder / "two", rank=2, seed=3, target_modules=["q_proj"]),
    }


@pytest.fixture
def write(adapters: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an expert: `write(name, adapter, **what from_peft takes)`."""

    def expert(name: str, adapter: str = "four", *, place: str = "pool", **options: Any) -> Path:
        plain = Expert.from_peft(adapters[adapter], {}, name=name)
        gates = {site: torch.ones(lora.A.shape[1]) for site, lora in plain.lora.items()}
        for vector in gates.values():
            vector[: len(name)] = 2.0
        options = {"gates": gates, "base": TINY_BASE, **options}
        made = Expert.from_peft(adapters[adapter], name=name, **options)
        return made.save(tmp_path / place / name).directory

    return expert


@pytest.fixture(scope="session")
def mixed_pool_of(
    loaded_bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Pool]:
    """`mixed_pool_of(kind)`: `mixed_pool_for` the tiny base of that kind, made once."""
    return cache(lambda kind: mixed_pool_for(loaded_bases[kind], tmp_path_factory.mktemp(kind)))


@pytest.fixture
def mixed_pool(kind: str, mixed_pool_of: Callable[[str], Pool]) -> Pool:
    """Experts of every kind, for the current base."""
    return mixed_pool_of(kind)


@pytest.fixture
def llama_mixed(mixed_pool_of: Callable[[str], Pool]) -> Pool:
    """Experts of every kind, for the tiny Llama."""
    return mixed_pool_of("llama")


@pytest.fixture(scope="session")
def uneven(loaded_bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """`uneven_pool` for the tiny Llama."""
    return uneven_pool(loaded_bases["llama"], tmp_path_factory.mktemp("uneven"))


@pytest.fixture
def toy_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`toy_embed` in place of the default sentence embedder."""
    use_toy_embedder(monkeypatch)


@pytest.fixture
def golden_copy(tmp_path: Path) -> Path:
    """A copy of the golden expert, to damage."""
    return shutil.copytree(GOLDEN, tmp_path / "golden")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub of one's own with an empty cache, online."""
    with serving_hub() as served:
        use_hub(served, tmp_path / "cache", monkeypatch)
        yield served


@pytest.fixture
def pair(llama_pool: Pool, tmp_path: Path) -> list[Path]:
    """Directories of two experts of the tiny Llama, the first with embeddings.

    They name it as if it was on the Hub, so that they may go there.
    """
    places = []
    for expert in (with_embeddings(llama_pool).experts[0], llama_pool.experts[1]):
        base = replace(expert.info.base, id="me/tiny-llama")
        named = replace(expert, info=replace(expert.info, base=base))
        places.append(named.save(tmp_path / expert.name).directory)
    return places


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that must stay as it is."""
    (tmp_path / "victim").write_text(KEPT)
    return tmp_path / "victim"


@pytest.fixture
def phat(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`phat(*arguments)`: the command run in this process."""
    return lambda *arguments: run(capsys, *arguments)


@pytest.fixture(scope="session")
def hub_copies(tmp_path_factory) -> Sources:
    """Where `write_hub` wrote its copies."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    places = write_hub(tmp_path_factory.mktemp("hub"))
    datasets.enable_progress_bars()
    return places


@pytest.fixture
def planned_here(
    tmp_path: Path, base_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder: a tiny base, and files to plan a training on."""
    write_rows(tmp_path / "counting.jsonl", [open_row(i) for i in range(20)])
    write_rows(tmp_path / "reviews.jsonl", [review(i) for i in range(30)])
    write_rows(tmp_path / "single.jsonl", [open_row(0)])
    shutil.copytree(base_folders["llama"], tmp_path / "tiny-base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def three_tasks(tmp_path: Path) -> list[TrainingTask]:
    """Three tasks of twenty rows, in files."""
    for name in ("one", "two", "three"):
        write_rows(tmp_path / f"{name}.jsonl", [open_row(i) for i in range(20)])
    return open_tasks([str(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three")])


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is a failure."""

    def connect(self, address):
        pytest.fail(f"a plan connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads; a second OpenMP pool makes them 100 times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _imported_for_good() -> None:
    """What lives between files of tests, such as imported modules, is no garbage.

    A Trainer looks through all that isn't frozen each time, seconds for what the libraries hold.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _templates_compiled_once() -> Iterator[None]:
    """PEFT writes a model card beside every adapter and compiles its template each time, 40 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", lru_cache(64)(jinja2.Environment.compile))
        yield
