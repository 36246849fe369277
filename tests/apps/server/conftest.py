"""Fixtures of the server's tests; a module may have others of these names."""

import pytest
import torch

from phatgoose.base import load_base
from phatgoose.config import Serving
from routed_models import compose_by, with_embeddings
from toy_embedders import use_toy_embedder


@pytest.fixture(scope="module")
def pool(pool_of):
    return pool_of("llama")


@pytest.fixture(scope="module")
def tokenizer(pool):
    return load_base(pool.base.id, dtype="float32").tokenizer


@pytest.fixture(scope="module")
def app(pool):
    import serving

    app = serving.app_of(pool, Serving(max_queue=80), patience=1)
    app.state.service.routings.most = 2
    return app


@pytest.fixture(scope="module")
def client(app):
    import serving

    with serving.client_of(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def chat(pool):
    """A client of a server whose base has a chat template."""
    import serving

    with serving.client_of(serving.app_of(pool, template=serving.CHAT_TEMPLATE)) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(pool):
    """A client of a server with two API keys."""
    import serving

    with serving.client_of(serving.app_of(pool, api_keys=["secret", "other"])) as client:
        yield client


@pytest.fixture
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def runner_of(pool_of):
    """`runner_of(kind, router)`: the pool of that kind of base, composed, without end tokens."""
    from phatgoose.apps.server.local.runner import ModelRunner

    made = {}

    def make(kind="llama", router="phatgoose"):
        if (kind, router) not in made:
            pool = pool_of(kind)
            base = load_base(pool.base.id, dtype="float32")
            runner = ModelRunner(compose_by(router, pool, base), base.tokenizer)
            runner.ends = frozenset()
            made[kind, router] = runner
        return made[kind, router]

    return make


@pytest.fixture(scope="module")
def place(pool_of, tmp_path_factory):
    """A pool's folder, whose experts have embeddings of the toy embedder."""
    folder = tmp_path_factory.mktemp("gateway") / "experts"
    for expert in with_embeddings(pool_of("llama")).experts:
        expert.save(folder / expert.name)
    return folder


@pytest.fixture(scope="module")
def embedder_for_all():
    with pytest.MonkeyPatch.context() as patch:
        use_toy_embedder(patch)
        yield
