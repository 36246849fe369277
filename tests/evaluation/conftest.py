"""Fixtures of the tests of comparisons."""

import shutil
from pathlib import Path

import pytest

from comparisons import (
    CHOOSE,
    COUNT,
    PICK,
    REFERENCES,
    SAY,
    TOKENS,
    TOML,
    Done,
    Setting,
    answers_of,
    write_rows,
)
from phatgoose.base import load_base
from phatgoose.routing.compose import compose, save
from phatgoose.tasks.suites.registry import open_suite
from phatgoose.tasks.task import Task
from routed_models import with_embeddings
from tiny import make_model, make_tokenizer
from toy_embedders import use_toy_embedder


@pytest.fixture(scope="session")
def setting(base_folders, pool_of, tmp_path_factory) -> Setting:
    """Three experts; two suites, a TOML file and a folder, that share a dataset; references."""
    folder, pool = tmp_path_factory.mktemp("setting"), pool_of("llama", (4, 4, 4))
    base = load_base(base_folders["llama"], dtype="float32")
    write_rows(folder / "plain" / "choose.jsonl", CHOOSE)
    write_rows(folder / "plain" / "count.jsonl", answers_of(COUNT, TOKENS, base, pool))
    write_rows(folder / "pick.jsonl", PICK)
    write_rows(folder / "say.jsonl", answers_of(SAY, 8, base, pool))
    (folder / "suite.toml").write_text(TOML)
    save(compose(pool.select(["e0", "e2"]), base, router="arrow", k=1), folder / "routed")
    make_model("llama", seed=1).save_pretrained(folder / "other")
    make_tokenizer(final_eos=False).save_pretrained(folder / "other")
    experts = pool.experts[0].directory.parent
    places = (experts / "e1", str(experts), folder / "routed", folder / "other")
    return Setting(
        base_folders["llama"],
        with_embeddings(pool),
        (folder / "suite.toml", str(folder / "plain")),
        dict(zip(REFERENCES, places, strict=True)),
    )


@pytest.fixture(scope="session")
def done(setting, tmp_path_factory) -> Done:
    """All methods and references on everything."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        use_toy_embedder(patch)
        return Done(folder, setting.run(folder, references=setting.references))


@pytest.fixture
def out(done, tmp_path) -> Path:
    """A copy of the finished comparison's folder, to go on with."""
    return shutil.copytree(done.folder, tmp_path / "out")


@pytest.fixture
def tasks(setting) -> dict[str, Task]:
    loaded = [task for suite in setting.suites for task in open_suite(suite).load()]
    return {task.name: task for task in loaded}
