"""Sharing over HTTP: push, pull, hub references in pools, the offline cache."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from huggingface_hub import constants

from changed_experts import set_config
from fake_hub import contents, pushed_now
from odd_files import one_line_of, rewrite
from paths import GOLDEN
from phatgoose.errors import ExpertError, PoolError
from phatgoose.experts.adapter_files import ADAPTER_WEIGHTS
from phatgoose.experts.expert import LAYOUT
from phatgoose.experts.hub import HubReference, fetch, pull, push, reference_of
from phatgoose.experts.importing import import_adapter
from phatgoose.experts.pool import Pool
from tiny import make_adapter

# huggingface_hub 2.4 hands its own HTTP client an argument that this one advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.mark.parametrize(
    "text",
    [
        *("hub:", "hub:me", "hub:me/x@", "hub:me/x/../y", "hub:me/x/.y", "a b/c", "hub:../x"),
        *("hub:me/x@../../../../../dev/zero", "hub:me/x@/dev/zero", "hub:me/x@-v", "hub:me/x@a`b"),
    ],
)
def test_what_is_no_reference_is_refused_with_the_form(text):
    reference = "hub:me/pool/reviews@refs/pr/1"
    parsed = HubReference.parse(reference)
    assert (parsed, str(parsed)) == (HubReference("me/pool", "reviews", "refs/pr/1"), reference)
    with pytest.raises(ExpertError, match="hub:OWNER/NAME"):
        HubReference.parse(text)


def test_a_pushed_expert_is_one_commit_of_all_its_files_and_is_pulled_as_it_was(
    hub, pair, tmp_path
):
    (pair[0] / LAYOUT.prompts).write_text("Is it good?\n")
    pushed = push(pair[0], "me/reviews")
    repository = hub.repositories["me/reviews"]
    assert pushed == HubReference("me/reviews", "", repository.branches["main"])
    assert repository.messages == ["initial commit", "Expert e0"]
    files = repository.commits[pushed.revision]
    assert {name: files[name] for name in files if name != ".gitattributes"} == contents(pair[0])
    assert LAYOUT.embeddings in files
    hub.add("me/reviews", {**files, "evil.py": b"import os", "a/b.safetensors": b"x"})
    for reference in (pushed, "hub:me/reviews@main"):
        out = tmp_path / "pulled" / str(reference).replace("/", "-")
        expert = pull(reference, out)
        assert (expert.name, expert.directory) == ("e0", out)
        assert contents(out) == contents(pair[0])
        assert not any(path.is_symlink() for path in out.iterdir())
        fetched = fetch(HubReference.parse(str(reference)))
        assert {path.name for path in fetched.rglob("*") if path.is_file()} == set(contents(out))
    push(pair[0], "me/secret", private=True)
    assert hub.repositories["me/secret"].private


def test_a_second_push_takes_away_what_the_expert_no_longer_has(hub, pair):
    push(pair[0], "me/reviews")
    repository = hub.repositories["me/reviews"]
    hub.add("me/reviews", {**repository.commits[pushed_now(hub)], "notes": b"x"})
    later = push(pair[1], "me/reviews", message="Without embeddings")
    files = repository.commits[later.revision]
    assert set(files) == {".gitattributes", "notes", *contents(pair[1])}
    assert LAYOUT.embeddings not in files
    assert repository.messages[-1] == "Without embeddings"


def test_an_expert_in_a_folder_of_a_repository(hub, pair, tmp_path):
    push(pair[0], "me/pool/first")
    pinned = push(pair[1], "me/pool/second")
    assert {"first/phatgoose.json", "second/phatgoose.json"} <= set(
        hub.repositories["me/pool"].commits[pinned.revision]
    )
    assert Pool.open("hub:me/pool").names == ("e0", "e1")
    assert Pool.open(f"hub:me/pool@{pinned.revision}").names == ("e0", "e1")
    assert pull("me/pool/second", tmp_path / "pulled").name == "e1"
    with pytest.raises(ExpertError, match=r"phatgoose\.json does not exist"):
        pull("me/pool", tmp_path / "no")


@pytest.mark.parametrize("moment", ["preupload", "PUT /objects", "/commit/"])
def test_a_push_that_the_hub_refuses_is_told_and_changes_nothing(hub, pair, moment):
    hub.add("me/reviews", {"notes": b"x"})
    hub.fail_on = moment
    told = one_line_of(lambda: push(pair[0], "me/reviews"), ExpertError)
    assert "can't be pushed to hub:me/reviews" in told
    assert len(hub.repositories["me/reviews"].commits) == 1


@pytest.mark.parametrize("moment", ["/api/models/", ADAPTER_WEIGHTS])
def test_a_pull_that_the_hub_refuses_is_told_and_leaves_nothing(hub, pair, tmp_path, moment):
    push(pair[0], "me/reviews")
    hub.fail_on = moment
    with pytest.raises(ExpertError, match=r"hub:me/reviews can't be fetched"):
        pull("me/reviews", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("reference", ["me/nothing", "me/reviews@nowhere", "me/reviews/folder"])
def test_what_the_hub_lacks_is_told_in_one_line(hub, pair, tmp_path, reference):
    push(pair[0], "me/reviews")
    told = one_line_of(lambda: pull(reference, tmp_path / "pulled"), ExpertError)
    assert reference.split("/")[-1] in told


def test_a_plain_adapter_on_the_hub_is_no_expert_but_can_be_imported(hub, llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter")
    sha = hub.add("you/lora", contents(adapter))
    with pytest.raises(ExpertError, match="phatgoose import"):
        pull("you/lora", tmp_path / "pulled")
    with pytest.raises(ExpertError, match=r"nobody else can load; name the base with --base"):
        import_adapter("you/lora", tmp_path / "mine")
    expert = import_adapter("you/lora@main", tmp_path / "mine", base=llama.id)
    assert expert.info.hyperparameters["imported_from"] == f"hub:you/lora@{sha}"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (expert.directory / file).read_bytes() == (adapter / file).read_bytes()


def test_adapters_on_the_hub_are_a_pool_under_their_names_there(hub, llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter")
    hub.add("you/base", contents(Path(llama.id)))
    hub.add("you/mine", contents(adapter))  # which names its base by a path
    with pytest.raises(PoolError, match="nobody else can load"):
        Pool.open("hub:you/mine")
    set_config(adapter, base_model_name_or_path="you/base")
    sha = hub.add("you/lora", contents(adapter))
    pool = Pool.open("hub:you/lora")
    assert (pool.names, pool.base.id) == (("lora",), "you/base")
    imported = pool["lora"].info.hyperparameters["imported_from"]
    assert imported == pool.records()[0]["path"] == f"hub:you/lora@{sha}"


@pytest.mark.parametrize(
    ("name", "is_asked_for"),
    [("../phatgoose.json", True), ("/README.md", True), ("x/../../../README.md", False)],
)
def test_a_hub_can_not_make_files_outside_the_cache(hub, pair, tmp_path, name, is_asked_for):
    hub.add("me/evil", {**contents(pair[0]), name: b"{}"})
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    with pytest.raises(ExpertError) if is_asked_for else nullcontext():
        Pool.open("hub:me/evil")
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    cache = tmp_path / "cache"
    inside = (cache / "models--me--evil", cache / ".locks", cache / "CACHEDIR.TAG")
    for path in cache.rglob("*"):
        assert any(path.resolve().is_relative_to(place.resolve()) for place in inside), path


def test_what_was_fetched_once_is_there_offline(hub, pair, tmp_path, monkeypatch):
    pinned = push(pair[0], "me/e0")
    Pool.open("hub:me/e0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    for place in ("hub:me/e0", "hub:me/e0@main", str(pinned)):
        assert Pool.open(place).names == ("e0",)
    with pytest.raises(ExpertError, match="can't be fetched"):
        Pool.open("hub:me/e1")
    assert hub.requests == []


def test_a_folder_that_looks_like_the_hubs_cache_is_not_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    inside = Path("models--famous--expert", "snapshots", "a" * 40)
    forged = shutil.copytree(GOLDEN, tmp_path / "received" / inside)
    assert reference_of(forged) is None
    record = Pool.open(forged).records()[0]
    assert record["path"] == str(forged.resolve())
    real = shutil.copytree(GOLDEN, tmp_path / "cache" / inside)
    assert str(reference_of(real)) == f"hub:famous/expert@{'a' * 40}"
    shutil.copytree(GOLDEN, real / "inner")
    assert str(reference_of(real / "inner")) == f"hub:famous/expert/inner@{'a' * 40}"
    assert reference_of(real.parent / "main") is None
    assert reference_of(tmp_path / "cache") is None


def test_an_expert_on_a_base_of_this_machine_or_a_damaged_one_is_not_published(hub, pair, tmp_path):
    """Nobody else could load it, and the path would be told to all."""
    place = shutil.copytree(pair[0], tmp_path / "mine")
    for base in (str(tmp_path), "./base"):
        rewrite(place / LAYOUT.info, base={"id": base})
        with pytest.raises(ExpertError, match="names its base by a path"):
            push(place, "me/reviews")
    assert "me/reviews" not in hub.repositories
    rewrite(place / LAYOUT.info, base={"id": "me/base"})
    assert push(place, "me/reviews").repo == "me/reviews"
    (place / LAYOUT.vectors).write_bytes(b"damaged")
    hub.requests.clear()
    with pytest.raises(ExpertError, match=LAYOUT.vectors):
        push(place, "me/reviews")
    assert hub.requests == []
