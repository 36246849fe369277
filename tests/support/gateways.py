"""Gateways of a tiny pool to a fake engine, for tests."""

from contextlib import contextmanager

import httpx2

import serving
from phatgoose.apps.server import ServedModel, Upstream, create_app
from phatgoose.base import load_base
from phatgoose.config import Routing
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import open_prompt_router
from serving import GREEDY

NAMES = ("e0", "e1", "e2", "e3")
ASK = {**GREEDY, "model": "auto"}


def numbered(names=NAMES):
    return {name: str(number) for number, name in enumerate(names)}


def gateway_app(place, engine, limits=None, *, router="retrieval", template=None, key=None):
    """The application of a gateway to `engine`; for one event loop."""
    models = [ServedModel("goose", str(place), Routing(router), dtype="float32")]
    app = create_app(models, limits, upstream=Upstream(engine.url, key))
    for each in app.state.service.models.values() if template else ():
        each.tokenizer.chat_template = template
    return app


@contextmanager
def gateway(place, engine, limits=None, *, ready=True, **options):
    """A client of a gateway to `engine`, once it has the experts unless it is not `ready`."""
    app = gateway_app(place, engine, limits, **options)
    with serving.client_of(app, raise_server_exceptions=False) as client:
        if ready:
            serving.until(lambda: client.get("/healthz").status_code == 200)
        yield client


@contextmanager
def running_gateway(place, engine, limits=None):
    """The address of a gateway to `engine` under our uvicorn, once it has the experts."""
    with serving.running(gateway_app(place, engine, limits)) as url:
        serving.until(lambda: httpx2.get(f"{url}/healthz").status_code == 200)
        yield url


def chosen_by(place, prompt, router="retrieval", *, with_base=False):
    """What the router alone chooses, by name; `with_base` where it reads prompts with the base."""
    pool = Pool.open(place)
    base = load_base(pool.base.id, dtype="float32") if with_base else None
    chooser = open_prompt_router(pool, base and base.tokenizer, router=router)
    return chooser.choose([prompt], base and base.model).named(chooser.experts)[0]
