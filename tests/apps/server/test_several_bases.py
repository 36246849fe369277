"""A gateway whose experts are of several bases, or of which only names and prompts are known."""

import shutil
import socket
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from fake_engine import ASK, BASE, NAMES, engine_of, gateway, numbered
from phatgoose.apps.server import Upstream
from phatgoose.config import Serving
from phatgoose.errors import ConfigError, PoolError
from phatgoose.experts.expert import LAYOUT
from phatgoose.experts.pool import Pool
from routed_models import with_embeddings
from serving import PATH, ask, chunks_of, error_of, health_of, text_of, until
from topic_prompts import OWNERS, PROMPTS

pytestmark = pytest.mark.usefixtures("embedder_for_all")

BIRDS = ["Is a heron a bird?", "Which birds dive?", "How far do swifts fly?"]
SUMS = ["What is 12 + 7?", "Add 3 to 9.", "What is 8 times 6?"]


@pytest.fixture(scope="module")
def both(place, pool_of, tmp_path_factory):
    """A folder with e0 and e1 of one base, and g2 and g3 of another; and these bases."""
    folder = tmp_path_factory.mktemp("both") / "experts"
    for name in ("e0", "e1"):
        shutil.copytree(place / name, folder / name)
    others = with_embeddings(pool_of("gpt2"))
    for expert in others.experts[2:]:
        name = f"g{expert.name[1:]}"
        replace(expert, info=replace(expert.info, name=name)).save(folder / name)
    return folder, Pool.open(place).base.id, others.base.id


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


@contextmanager
def engines_of(*bases, kind="vllm", adapters=(), **options):
    """Engines whose models' roots are these bases; None tells nothing."""
    with ExitStack() as stack:
        engines = [stack.enter_context(engine_of(kind, adapters, **options)) for _ in bases]
        for number, (engine, base) in enumerate(zip(engines, bases, strict=True)):
            engine.root, engine.base = base, f"model-{number}"
        yield engines


def test_an_expert_goes_to_the_engine_of_its_base_alone(both):
    place, llama, gpt2 = both
    with engines_of(llama, gpt2.upper()) as engines, gateway(place, engines) as client:
        one, other = engines
        assert (set(one.adapters), set(other.adapters)) == ({"e0", "e1"}, {"g2", "g3"})
        for prompt, owner in zip(PROMPTS, OWNERS, strict=True):
            name = owner if owner < "e2" else f"g{owner[1:]}"
            assert text_of(client, **ASK | {"prompt": prompt}).startswith(f"{name} ")
        for base, engine in ((llama, one), (gpt2, other), ("model-1", other), ("model-0", one)):
            before = len(engine.requests)
            ask(client, **ASK | {"model": base})
            assert len(engine.requests) == before + 1
        for _ in range(4):  # what says nothing fits no expert: the first engine's base
            blank = [{"role": "user", "content": " "}]
            reply = ask(client, path="/v1/chat/completions", model="auto", messages=blank)
            assert reply["choices"][0]["message"]["content"].startswith("model-0 ")
        error = error_of(client, **ASK, weights={"e0": 0.5, "g2": 0.5})
        assert "can't mix" in error["message"]
        other.adapters["e1"] = "/a stranger's"  # of equal shapes, perhaps
        one.stop()
        until(lambda: health_of(client)["upstreams"] == ["away", "ok"])
        assert error_of(client, 503, **ASK | {"model": "e1"})["code"] == "upstream_unavailable"


def test_the_operator_says_what_an_engine_does_not(both):
    place, llama, gpt2 = both
    with engines_of(None, None) as engines:
        engines[0].said, engines[1].said = llama, gpt2
        with gateway(place, engines, default="model-1") as client:
            assert text_of(client, **ASK | {"model": "g2"}).startswith("g2 ")
            assert "e0" not in engines[1].adapters
            blank = [{"role": "user", "content": " "}]
            reply = ask(client, path="/v1/chat/completions", model="auto", messages=blank)
            assert reply["choices"][0]["message"]["content"].startswith("model-1 ")


def test_an_expert_whose_base_no_engine_has_is_named(both, phat):
    place, llama, gpt2 = both
    said = "'g2' is for base {}, but the engines have {}; if one has it, say so: --upstream BASE="
    with engines_of(llama, llama) as engines:
        upstreams = [part for engine in engines for part in ("--upstream", engine.url)]
        outcome = phat("serve", place, *upstreams, "--port", free_port(), "--router", "retrieval")
        assert outcome.code == 2
        assert said.format(gpt2, "model-0, model-1") in " ".join(outcome.err.split())
        with gateway(place, engines, ready=False) as client:
            until(lambda: health_of(client)["upstreams"] == ["ok", "ok"])
            message = error_of(client, 503, **ASK)["message"]
            assert said.format(gpt2.rpartition("/")[2], "model-0, model-1") in message
    with engines_of(llama, gpt2) as engines:
        upstreams = [part for engine in engines for part in ("--upstream", engine.url)]
        options = ["--port", free_port(), "--router", "retrieval", "--default", "mine"]
        outcome = phat("serve", place, *upstreams, *options)
        assert outcome.code == 2
        assert "No engine has the --default model; they have model-0, model-1." in outcome.err


def test_bases_of_one_last_name_are_told_apart_by_the_whole(both, tmp_path):
    place, *_ = both
    for name, base in (("e0", "me/tiny"), ("g2", "you/tiny")):
        expert = Pool.open(place / name).experts[0]
        info = replace(expert.info, base=replace(expert.info.base, id=base))
        replace(expert, info=info).save(tmp_path / name)
    with engines_of("me/tiny", "you/tiny") as engines, gateway(tmp_path, engines):
        assert [set(engine.adapters) for engine in engines] == [{"e0"}, {"g2"}]


def test_other_engines_call_each_base_their_way(both):
    place, llama, gpt2 = both
    names = [llama.rpartition("/")[2].upper(), gpt2]
    with ExitStack() as stack:
        engines = []
        for base, experts in zip(names, (("e0", "e1"), ("g2", "g3")), strict=True):
            listed = numbered([f"{base}:{name}" for name in experts])
            engines.append(stack.enter_context(engine_of("other", listed)))
            engines[-1].base = base
        client = stack.enter_context(gateway(place, engines, model_name="{base}:{expert}"))
        for name, base in (("e1", names[0]), ("g3", names[1])):
            assert text_of(client, **ASK | {"model": name}).startswith(f"{base}:{name} ")


def test_one_base_of_two_fingerprints_is_refused(both, tmp_path):
    place, llama, _ = both
    for name in ("e0", "g2"):
        expert = Pool.open(place / name).experts[0]
        info = replace(expert.info, base=replace(expert.info.base, id="me/tiny"))
        replace(expert, info=info).save(tmp_path / name)
    with engines_of(llama) as engines, pytest.raises(ConfigError, match="bases are called 'me/"):
        gateway(tmp_path, engines).__enter__()


def test_elsewhere_a_pool_has_one_base(both):
    with pytest.raises(PoolError, match="a pool has one base"):
        Pool.open(both[0])


@pytest.mark.parametrize(
    ("written", "url", "base"),
    [
        ("http://host:1", "http://host:1", None),
        ("me/tiny=http://host:1", "http://host:1", "me/tiny"),
        ("/a=b/tiny=https://host/v1", "https://host/v1", "/a=b/tiny"),
        ("http://host/x=http", "http://host/x=http", None),
    ],
)
def test_an_engine_is_written_with_its_base_or_without(written, url, base):
    upstream = Upstream.of(written, None, None, None)
    assert (upstream.url, upstream.base) == (url, base)


# Names and prompts alone.


def in_folders(place):
    for name, prompts in (("e0", BIRDS), ("e1", SUMS)):
        (place / name).mkdir(parents=True)
        (place / name / LAYOUT.prompts).write_text("\n".join(prompts))
    return place


def in_table(place):
    (place / "names.toml").write_text(
        f"[experts.e0]\nprompts = {BIRDS}\n[experts.e1]\nprompts = {SUMS}\n"
    )
    return place / "names.toml"


@pytest.mark.parametrize("write", [in_folders, in_table])
@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_names_and_prompts_are_a_pool_of_what_an_engine_has(write, kind, tmp_path):
    with (
        engine_of(kind) as engine,
        gateway(write(tmp_path), engine, router="auto") as client,
    ):
        model = client.get("/v1/models/goose").json()
        assert (model["router"], model["experts"]) == ("discriminant", ["e0", "e1"])
        assert model["prompts"] == [BIRDS[0], SUMS[0]]
        for prompt, name in (("Is a gull a bird?", "e0"), ("What is 5 + 6?", "e1")):
            reply = client.post(PATH, json={**ASK, "prompt": prompt})
            assert reply.headers["x-phatgoose-experts"] == f"{name}=1"
            assert reply.json()["choices"][0]["text"].startswith(name)
        assert text_of(client, **ASK | {"model": BASE}).startswith(f"{BASE} ")
        assert chunks_of(client, **ASK | {"model": "e1"})
        assert not engine.loaded


def test_a_name_that_the_engine_lacks_is_a_line_of_the_log(tmp_path, caplog):
    place = in_folders(tmp_path)
    with engine_of("vllm", numbered(NAMES[1:])) as engine:
        with gateway(place, engine, ready=False, router="auto") as client:
            until(lambda: "can't be used" in caplog.text)
            assert error_of(client, 503, **ASK)["code"] == "upstream_unavailable"
        assert "lacks e0 (no adapter is here, only its prompts)" in caplog.text
        assert not engine.loaded


def test_a_changed_table_is_followed(tmp_path):
    place = in_table(tmp_path)
    options = {"limits": Serving(watch=True), "router": "auto"}
    with engine_of() as engine, gateway(place, engine, **options) as client:
        place.write_text(f"{place.read_text()}[experts.e2]\nprompts = {['a b', 'c d', 'e']}\n")
        until(lambda: client.get("/v1/models/goose").json()["experts"] == ["e0", "e1", "e2"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[experts.e0]\nprompts = [1]", "experts.e0.prompts.0: Input should be a valid string"),
        ("[experts.e0]\nprompts = []", "experts.e0.prompts: List should have at least 1 item"),
        ("[experts.e0]\nprompts = [' ']", "experts.e0.prompts.0: String should match"),
        ("[experts.e0]\nprompt = ['a']", "experts.e0.prompts: Field required"),
        ("[expert.e0]\nprompts = ['a']", "experts: Field required"),
        ("[experts.'a/b']\nprompts = ['a']", "'a/b' can't name an expert"),
        ("[experts", "names.toml is not valid: "),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, phat, content, said):
    place = tmp_path / "names.toml"
    place.write_text(content)
    outcome = phat("serve", place, "--upstream", "http://127.0.0.1:9", "--port", free_port())
    assert outcome.code == 2
    assert said in " ".join(outcome.err.split())


@pytest.mark.parametrize("write", [in_folders, in_table])
@pytest.mark.parametrize("command", ["serve", "compose", "audit"])
def test_elsewhere_names_alone_are_refused(tmp_path, phat, write, command):
    place = write(tmp_path / "pool" if write is in_folders else tmp_path)
    outcome = phat(command, place, *(["--out", tmp_path / "out"] if command == "compose" else []))
    assert outcome.code == 2
    said = "Only 'phatgoose serve --upstream' takes names and prompts without adapters."
    assert said in " ".join(outcome.err.split())
