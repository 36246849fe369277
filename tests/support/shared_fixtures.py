"""Tiny bases, tokenizers and experts, made from configs: no network, no downloads."""

import copy
import gc
import shutil
from dataclasses import replace
from functools import cache, lru_cache

import jinja2
import pytest
import torch
import typer
from hypothesis import HealthCheck, settings

from command_line import run
from fake_hub import using_hub
from mixed_experts import mixed_pool_for
from odd_files import KEPT
from paths import GOLDEN
from phatgoose.base.loading import load_base
from phatgoose.experts.pool import Pool
from phatgoose.routing.kernels import native
from routed_models import uneven_pool, with_embeddings
from suite_data import write_hub
from tiny import KINDS, make_model, make_tokenizer, write_expert
from toy_embedders import use_toy_embedder

# How long an example takes depends on who else is at work.
settings.register_profile("any clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any clock")


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory):
    """A local folder per kind of tiny base, as a user would have one."""
    folders = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("bases") / kind
        make_model(kind).save_pretrained(folder)
        make_tokenizer(final_eos=kind == "t5").save_pretrained(folder)
        folders[kind] = folder
    return folders


@pytest.fixture(params=KINDS)
def kind(request):
    return str(request.param)


@pytest.fixture(scope="session")
def loaded_bases(base_folders):
    """Each kind of base, loaded once: to be copied, which is far quicker than loading again."""
    return {kind: load_base(folder, dtype="float32") for kind, folder in base_folders.items()}


@pytest.fixture
def base(kind, loaded_bases):
    """A fresh base of the current kind, float32."""
    return copy.deepcopy(loaded_bases[kind])


@pytest.fixture
def llama(loaded_bases):
    """A fresh tiny Llama, float32, for tests that need one base only."""
    return copy.deepcopy(loaded_bases["llama"])


@pytest.fixture
def make_expert(tmp_path):
    """A function that writes a random expert: `make_expert(base, name, seed=…, rank=…)`."""
    return lambda base, name, **options: write_expert(base, tmp_path, name, **options)


@pytest.fixture(scope="session")
def pool_of(loaded_bases, tmp_path_factory):
    """`pool_of(kind)`: four random experts, e0 to e3, for that base, made once."""

    @cache
    def make(kind: str, ranks: tuple[int, ...] = (4, 4, 4, 4)):
        folder = tmp_path_factory.mktemp(kind)
        return Pool(
            tuple(
                write_expert(loaded_bases[kind], folder, f"e{z}", seed=z, rank=rank)
                for z, rank in enumerate(ranks)
            )
        )

    return make


@pytest.fixture
def pool(kind, pool_of):
    return pool_of(kind)


@pytest.fixture
def llama_pool(pool_of):
    return pool_of("llama")


@pytest.fixture(scope="session")
def mixed_pool_of(loaded_bases, tmp_path_factory):
    return cache(lambda kind: mixed_pool_for(loaded_bases[kind], tmp_path_factory.mktemp(kind)))


@pytest.fixture
def mixed_pool(kind, mixed_pool_of):
    return mixed_pool_of(kind)


@pytest.fixture
def llama_mixed(mixed_pool_of):
    return mixed_pool_of("llama")


@pytest.fixture(scope="session")
def uneven(loaded_bases, tmp_path_factory):
    return uneven_pool(loaded_bases["llama"], tmp_path_factory.mktemp("uneven"))


@pytest.fixture
def toy_embedder(monkeypatch):
    use_toy_embedder(monkeypatch)


@pytest.fixture
def no_native(monkeypatch):
    """No native kernel serves, as on a machine without a compiler."""
    monkeypatch.setenv("PHATGOOSE_NATIVE", "0")
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.fixture
def golden_copy(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "golden")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one's own with an empty cache, online."""
    with using_hub(tmp_path / "cache", monkeypatch) as used:
        yield used


@pytest.fixture
def pair(llama_pool, tmp_path):
    """Directories of two experts of a Llama "on the Hub", the first with embeddings."""
    places = []
    for expert in (with_embeddings(llama_pool).experts[0], llama_pool.experts[1]):
        base = replace(expert.info.base, id="me/tiny-llama")
        named = replace(expert, info=replace(expert.info, base=base))
        places.append(named.save(tmp_path / expert.name).directory)
    return places


@pytest.fixture
def victim(tmp_path):
    (tmp_path / "victim").write_text(KEPT)
    return tmp_path / "victim"


@pytest.fixture
def phat(capsys):
    """`phat(*arguments)`: the command run in this process."""
    return lambda *arguments: run(capsys, *arguments)


@pytest.fixture(scope="session")
def hub_copies(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    places = write_hub(tmp_path_factory.mktemp("hub"))
    datasets.enable_progress_bars()
    return places


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads; a second OpenMP pool makes them 100 times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _imported_for_good():
    """A Trainer looks through all that isn't frozen: seconds for what the libraries hold."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _made_once():
    """Typer makes all commands anew for each call, and PEFT compiles the template of its cards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        patch.setattr(jinja2.Environment, "compile", lru_cache(64)(jinja2.Environment.compile))
        yield
