"""An owner's repositories: what can be routed on one base, and why the rest can't."""

from __future__ import annotations

import json

import pytest

from fake_hub import contents
from phatgoose.errors import PoolError
from phatgoose.experts.expert import expert_files
from phatgoose.experts.hub import pull
from phatgoose.experts.hub_owner import import_listed, is_owner, list_owner
from phatgoose.experts.pool import Pool
from tiny import make_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(llama, tmp_path) -> dict[str, bytes]:
    """The files of a LoRA whose base is "you/base"."""
    return based_on(contents(make_adapter(llama, tmp_path / "adapter")), "you/base")


def based_on(files, base, **options):
    config = {**json.loads(files[CONFIG]), "base_model_name_or_path": base, **options}
    return {**files, CONFIG: json.dumps(config).encode()}


@pytest.fixture
def owned(hub, adapter, pair, base_folders):
    """The hub, with what "you" has: two LoRAs of one base, and what can't be routed with them."""
    hub.add("you/base", contents(base_folders["llama"]))
    hub.add("you/lora-a", adapter)
    hub.add("you/lora-b", {f"inner/{name}": data for name, data in adapter.items()})
    hub.add("you/pooled", based_on(adapter, "you/base", use_qalora=True))
    hub.add("you/expert", contents(pair[0]))
    hub.add("you/home", based_on(adapter, "/home/you/base"))
    hub.add("you/pickled", {CONFIG: adapter[CONFIG], "adapter_model.bin": b"\x80"})
    hub.add("you/empty", {CONFIG: adapter[CONFIG]})
    hub.add("you/broken", {**adapter, CONFIG: b"{"})
    hub.add("you/dataset", {"README.md": b"", "a/b/adapter_config.json": b""})
    hub.add("me/lora", adapter)
    return hub


def refusals(listing):
    return {each.place: each.refusal for each in listing.found}


def test_a_listing_says_what_can_be_routed_and_why_the_rest_can_t(owned, pair):
    listing = list_owner("hub:you/*")
    assert listing.base == "you/base"
    assert [each.place for each in listing.routable] == ["you/lora-a", "you/lora-b/inner"]
    assert (listing.others, listing.is_whole) == (2, True)
    why = refusals(listing)
    assert "use_qalora" in why["you/pooled"]
    assert why["you/expert"].startswith("its base is ")
    assert "path of its author's machine" in why["you/home"]
    assert "pickled" in why["you/pickled"]
    assert why["you/empty"] == "it has no weights"
    assert "adapter_config.json" in why["you/broken"]
    assert not [reason for reason in why.values() if reason and "/snapshots/" in reason]
    by_place = {each.place: each for each in listing.found}
    lora, expert = by_place["you/lora-a"], by_place["you/expert"]
    assert (lora.kind, lora.is_expert, len(lora.reference.revision)) == ("lora", False, 40)
    assert (expert.kind, expert.is_expert) == ("lora", True)
    files = owned.repositories["you/lora-a"].commits[lora.reference.revision]
    assert lora.size == sum(len(data) for name, data in files.items() if name in expert_files())
    fetched = [request for request in owned.requests if "/resolve/" in request]
    assert not [r for r in fetched if r.startswith("GET") and r.endswith((".safetensors", ".bin"))]


def test_patterns_and_bases_choose(owned, pair):
    assert [each.place for each in list_owner("hub:you/lora-?").found] == [
        "you/lora-a",
        "you/lora-b/inner",
    ]
    other = next(e for e in list_owner("hub:you/expert*").found).base
    listing = list_owner("hub:you/*", other)
    assert [each.place for each in listing.routable] == ["you/expert"]
    assert refusals(listing)["you/lora-a"] == "its base is 'you/base'"
    assert list_owner("hub:nobody/*").found == ()


@pytest.mark.parametrize(
    ("place", "wanted"),
    [("hub:me/*", True), ("hub:me/a-*", True), ("hub:me/a", False), ("me/*", False), ("*", False)],
)
def test_owners_are_told_from_other_places(place, wanted):
    assert is_owner(place) is wanted
    if not wanted:
        with pytest.raises(PoolError, match=r"hub:OWNER/\*"):
            list_owner(place)


def test_sizes_are_asked_for_before_anything_is_fetched(owned):
    owned.sizes = {CONFIG: 2**30}
    assert "larger than 16 MiB" in refusals(list_owner("hub:you/lora-a*"))["you/lora-a"]
    owned.sizes = {WEIGHTS: 2**40}
    assert "larger than 2 GiB" in refusals(list_owner("hub:you/lora-a*"))["you/lora-a"]
    owned.fail_on = "/revision/"
    assert "doesn't say how large" in refusals(list_owner("hub:you/lora-a*"))["you/lora-a"]
    assert not [request for request in owned.requests if "/resolve/" in request]
    owned.fail_on = "/api/models"
    with pytest.raises(PoolError, match="can't be listed"):
        list_owner("hub:you/*")


def test_what_is_counted_is_what_an_import_fetches(hub, adapter, pair, tmp_path):
    expert = contents(pair[0])
    for place, files in (("you/lora", adapter), ("you/expert", expert)):
        inner = {f"a/{name}": data for name, data in expert.items()}
        hub.add(place, files | inner | {f"b/c/{name}": data for name, data in expert.items()})
    sizes = {each.place: each.size for each in list_owner("hub:you/*").found}
    own = sum(len(expert[name]) for name in expert if name in expert_files())
    info = len(expert["phatgoose.json"])
    assert sizes["you/expert"] == own + info
    pull("you/expert", tmp_path / "pulled")
    fetched = (tmp_path / "cache" / "models--you--expert" / "snapshots").rglob("*")
    assert sum(path.stat().st_size for path in fetched if path.is_file()) == own + info


@pytest.mark.filterwarnings("ignore:No fingerprint")
def test_what_can_be_routed_is_fetched_and_makes_a_pool(owned, tmp_path):
    out = tmp_path / "pool"
    fetched = import_listed(list_owner("hub:you/*"), out)
    assert sorted(path.name for path in out.iterdir()) == ["lora-a", "lora-b--inner"]
    assert len(fetched.routable) == 2
    pool = Pool.open(out)
    assert pool.names == ("lora-a", "lora-b--inner")
    assert pool.base.id == "you/base"
    before = len(owned.requests)
    again = import_listed(fetched, out)  # what is there stays
    assert (again, len(owned.requests)) == (fetched, before)


def test_what_turns_out_to_be_damaged_has_the_reason(owned, adapter, tmp_path):
    owned.add("you/lora-a", {**adapter, WEIGHTS: b"short"})
    fetched = import_listed(list_owner("hub:you/lora-*"), tmp_path / "pool")
    assert WEIGHTS in refusals(fetched)["you/lora-a"]
    assert [each.place for each in fetched.routable] == ["you/lora-b/inner"]
    with pytest.raises(PoolError, match="Nothing of hub:you/lora-a\\* was imported"):
        import_listed(list_owner("hub:you/lora-a*"), tmp_path / "other")
    assert not (tmp_path / "other" / "lora-a").exists()
