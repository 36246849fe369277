"""A server whose pool changes on the disk: it has the old one until the new one is whole."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

import serving
from fake_engine import engine_of
from gateways import ASK, gateway, numbered
from phatgoose.apps.server import ServedModel, Upstream, create_app
from phatgoose.apps.server import service as following
from phatgoose.config import Routing, Serving
from phatgoose.experts.pool import Pool
from serving import GREEDY, PATH, ask, held, text_of, until

pytestmark = pytest.mark.usefixtures("embedder_for_all")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(following, "LOOKING", 0.05)


@pytest.fixture
def folder(place, tmp_path):
    """A pool that a test may change: e0 and e1."""
    for name in ("e0", "e1"):
        shutil.copytree(place / name, tmp_path / "pool" / name)
    return tmp_path / "pool"


def experts_of(client, name="goose"):
    return client.get(f"/v1/models/{name}").json()["experts"]


def client_at(place, **limits):
    model = ServedModel("goose", str(place), dtype="float32", routing=Routing("phatgoose"))
    return serving.client_of(create_app([model], Serving(**limits)))


def outcomes(client):
    lines = client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("phatgoose_reopened_total")]
    return {line.partition('"')[2].partition('"')[0]: float(line.split()[-1]) for line in found}


def test_a_watched_pool_takes_an_expert_in_and_gives_one_up(place, folder):
    with client_at(folder, watch=True) as client:
        assert experts_of(client) == ["e0", "e1"]
        before = text_of(client, **GREEDY, router="single:expert=e1")
        shutil.copytree(place / "e2", folder / "e2")
        until(lambda: experts_of(client) == ["e0", "e1", "e2"])
        assert text_of(client, **GREEDY, router="single:expert=e1") == before
        text_of(client, **GREEDY, router="single:expert=e2")
        shutil.rmtree(folder / "e0")
        until(lambda: experts_of(client) == ["e1", "e2"])
        assert outcomes(client) == {"reopened": 2.0}


def test_a_damaged_pool_leaves_the_old_one_in_its_place(place, folder, caplog):
    with client_at(folder, watch=True) as client:
        wanted = text_of(client, **GREEDY)
        (folder / "e1" / "phatgoose.json").write_text("{")
        until(lambda: outcomes(client) == {"kept": 1.0})
        assert "served as it was" in caplog.text
        assert text_of(client, **GREEDY) == wanted
        shutil.copyfile(place / "e1" / "phatgoose.json", folder / "e1" / "phatgoose.json")
        shutil.copytree(place / "e2", folder / "e2")
        until(lambda: experts_of(client) == ["e0", "e1", "e2"])


def test_an_answer_in_flight_is_finished_by_the_experts_it_began_with(place, folder):
    body = {**GREEDY, "weights": {"e0": 0.6, "e1": 0.4}, "max_tokens": 8}
    with client_at(folder, watch=True) as client:
        wanted = text_of(client, **body)
        with held(2) as go_on:
            thread, found = serving.in_a_thread(text_of, client, **body)
            until(lambda: client.app.state.service.backend.engine.running == 1)
            shutil.rmtree(folder / "e0")
            shutil.copytree(place / "e2", folder / "e2")
            until(lambda: experts_of(client) == ["e1", "e2"])
            go_on.set()
            thread.join()
        assert found == [wanted]
        assert client.post(PATH, json=body).status_code == 400  # e0 is gone


def renamed_base(folder, twin):
    """Give the base of the pool another name: the folder `twin`."""
    base = Pool.open(folder).base.id
    shutil.copytree(base, twin)
    for config in folder.glob("*/phatgoose.json"):
        config.write_text(config.read_text().replace(json.dumps(base), json.dumps(str(twin))))


def touch(folder, second):
    os.utime(folder / "e0" / "phatgoose.json", (second, second))


def children():
    tasks = Path("/proc/self/task").iterdir()
    return {child for task in tasks for child in (task / "children").read_text().split()}


@pytest.mark.skipif(sys.platform != "linux", reason="counts processes by /proc")
def test_reloads_leave_no_process_behind_where_the_base_has_another_name(folder, tmp_path):
    with client_at(folder, watch=True) as client:
        renamed_base(folder, tmp_path / "twin")
        counts = []
        for number in (1, 2, 3):
            touch(folder, number)
            until(lambda n=number: outcomes(client) == {"reopened": float(n)})
            text_of(client, **GREEDY)
            counts.append(len(children()))
    assert counts[0] == counts[1] == counts[2]


def change(place, folder):
    """Give e1 the weights of e2."""
    pool, config = Pool.open(place), folder / "e1" / "phatgoose.json"
    shutil.copyfile(place / "e2/adapter_model.safetensors", folder / "e1/adapter_model.safetensors")
    before, after = (pool[name].info.adapter_sha256 for name in ("e1", "e2"))
    config.write_text(config.read_text().replace(before, after))
    return after


def test_requests_while_an_expert_is_loaded_again_do_not_bring_it_back_as_it_was(place, folder):
    with (
        engine_of("vllm", numbered(("e0", "e1"))) as engine,
        gateway(folder, engine, Serving(watch=True)) as client,
    ):
        engine.mode = "slow"  # between giving e1 up and having it again
        content = change(place, folder)
        until(lambda: "e1" not in engine.adapters)
        assert client.post(PATH, json={**ASK, "model": "e1"}).status_code == 503
        thread, found = serving.in_a_thread(client.post, PATH, json={**ASK, "model": "e1"})
        time.sleep(0.3)  # in which it could load e1
        engine.mode = "well"
        engine.go_on.set()
        thread.join(30)
        assert (found[0].status_code, engine.requests[-1]["cache_salt"]) == (200, content)
        until(lambda: outcomes(client) == {"reopened": 1.0})
        assert experts_of(client, "auto") == ["e0", "e1"]


def test_a_gateway_has_what_joins_and_what_changed_loaded(place, folder):
    with (
        engine_of("vllm", numbered(("e0", "e1"))) as engine,
        gateway(folder, engine, Serving(watch=True)) as client,
    ):
        content = change(place, folder)
        shutil.copytree(place / "e3", folder / "e3")
        until(lambda: "e3" in experts_of(client, "auto"))
        until(lambda: "e3" in engine.adapters)
        again = {"lora_name": "e1", "lora_path": str((folder / "e1").resolve())}
        assert {**again, "load_inplace": True} in engine.loaded
        assert again in engine.loaded
        ask(client, **{**ASK, "model": "e1"})
        assert engine.requests[-1]["cache_salt"] == content
        ask(client, **{**ASK, "model": "e3"})


def test_an_expert_of_two_pools_is_wanted_as_it_is_now(place, folder):
    with engine_of("vllm", numbered(("e0", "e1"))) as engine:
        models = [ServedModel(name, str(folder), Routing("retrieval")) for name in ("one", "two")]
        app = create_app(models, upstream=Upstream(engine.url))
        with serving.client_of(app) as client:
            content = change(place, folder)
            client.portal.call(app.state.service.backend.reopened, "two")
        assert app.state.service.backend.link.experts["e1"].content == content


def test_a_pool_that_the_engine_can_not_have_stays_as_it_was(place, folder, caplog):
    with (
        engine_of("sglang", numbered(("e0", "e1"))) as engine,
        gateway(folder, engine, Serving(watch=True)) as client,
    ):
        change(place, folder)
        shutil.copytree(place / "e3", folder / "e3")
        until(lambda: outcomes(client) == {"kept": 1.0})
        assert "has e1 from before it changed" in caplog.text
        assert experts_of(client, "auto") == ["e0", "e1"]
        ask(client, **{**ASK, "model": "e1"})
