"""A server whose pool changes on the disk: it has the old one until the new one is whole."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import serving
from fake_engine import engine_of
from gateways import ASK, gateway, numbered
from phatgoose.apps.server import ServedModel, create_app
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


def test_a_gateway_has_what_joins_loaded_and_keeps_what_the_engine_can_not_have(
    place, folder, caplog
):
    with (
        engine_of("vllm", numbered(("e0", "e1"))) as engine,
        gateway(folder, engine, Serving(watch=True)) as client,
    ):
        engine.mode = "loading slowly"
        shutil.copytree(place / "e3", folder / "e3")
        until(lambda: engine.loaded)
        ask(client, **{**ASK, "model": "e1"})  # others are answered meanwhile
        engine.go_on.set()
        until(lambda: experts_of(client, "auto") == ["e0", "e1", "e3"])
        assert engine.adapters["e3"] == str((folder / "e3").resolve())
        ask(client, **{**ASK, "model": "e3"})
        # e1 gets the weights of e2, and the engine has the old ones.
        pool, config = Pool.open(place), folder / "e1" / "phatgoose.json"
        weights = "adapter_model.safetensors"
        shutil.copyfile(place / "e2" / weights, folder / "e1" / weights)
        before, after = (pool[name].info.adapter_sha256 for name in ("e1", "e2"))
        config.write_text(config.read_text().replace(before, after))
        until(lambda: outcomes(client).get("kept") == 1.0)
        assert "lacks e1 as the pool has them now (they changed)" in caplog.text
        ask(client, **{**ASK, "model": "e1"})
