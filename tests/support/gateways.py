"""Gateways of a tiny pool to a fake engine, for tests."""

from contextlib import contextmanager

import serving
from phatgoose.apps.server import ServedModel, Upstream, create_app
from phatgoose.config import Routing
from phatgoose.routing.compose import open_prompt_router
from serving import GREEDY

NAMES = ("e0", "e1", "e2", "e3")
ASK = {**GREEDY, "model": "auto"}


def numbered(names=NAMES):
    return {name: str(number) for number, name in enumerate(names)}


@contextmanager
def gateway(place, engine, limits=None, *, router="retrieval", template=None, **options):
    """A client of a gateway to `engine`, and the application."""
    upstream = Upstream(engine.url, wait=0, **options.pop("upstream", {}))
    models = [ServedModel("goose", str(place), Routing(router), dtype="float32")]
    app = create_app(models, limits, upstream=upstream, **options)
    for each in app.state.service.models.values():
        each.tokenizer.chat_template = template
    with serving.client_of(app, raise_server_exceptions=False) as client:
        yield client


def chosen_by(place, prompt, router="retrieval"):
    """What the router alone chooses, by name."""
    found = open_prompt_router(place, router=router)
    return found.choose([prompt]).named(found.experts)[0]
