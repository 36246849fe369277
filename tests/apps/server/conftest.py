"""Fixtures of the server's tests; a module may have others of these names."""

from __future__ import annotations

import pytest

from phatgoose.config import Serving


@pytest.fixture(scope="module")
def pool(pool_of):
    return pool_of("llama")


@pytest.fixture(scope="module")
def app(pool):
    import serving

    return serving.app_of(pool, Serving(read_timeout=1, max_connections=8, max_routings=3))


@pytest.fixture(scope="module")
def client(app):
    import serving

    with serving.client_of(app) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(pool):
    import serving

    with serving.client_of(serving.app_of(pool, api_keys=["secret", "other"])) as client:
        yield client
