"""Fixtures of the server's tests; a module may have others of these names."""

from contextlib import ExitStack
from functools import cache

import pytest
import torch

from phatgoose.base.loading import load_base
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
def client_with(pool):
    """A function from options of `serving.app_of` to a client."""
    import serving

    with ExitStack() as stack:

        def opened(limits=None, **options):
            app = serving.app_of(pool, limits, **options)
            client = serving.client_of(app, raise_server_exceptions=False)
            return stack.enter_context(client)

        yield opened


@pytest.fixture(scope="module")
def client(client_with):
    client = client_with(Serving(max_queue=80), patience=1)
    client.app.state.service.routings.most = 2
    return client


@pytest.fixture(scope="module")
def guarded(client_with):
    """A client of a server with two API keys."""
    return client_with(api_keys=["secret", "other"])


@pytest.fixture
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def runner_of(pool_of):
    """`runner_of(kind, router)`: the pool of that kind of base, composed, without end tokens."""
    from phatgoose.apps.server.local.runner import ModelRunner

    @cache
    def composed(kind, router):
        base = load_base(pool_of(kind).base.id, dtype="float32")
        runner = ModelRunner(compose_by(router, pool_of(kind), base), base.tokenizer)
        runner.ends = frozenset()
        return runner

    return lambda kind="llama", router="phatgoose": composed(kind, router)


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
