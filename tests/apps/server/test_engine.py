"""The engine: who is computed when, and what happens when it fails."""

from dataclasses import replace

import pytest
import torch

from batched import GREEDY, by_generate, prompt_of, raises, row_of
from phatgoose.apps.server.local import GenerationEngine
from phatgoose.apps.server.protocol import ApiError
from phatgoose.config import Serving
from phatgoose.errors import RoutingError

pytestmark = pytest.mark.usefixtures("no_gradients")


def engine_of(**limits):
    return GenerationEngine(Serving(**{"max_batch_tokens": 4096, **limits}))


@pytest.fixture
def engine():
    """A running engine."""
    made = engine_of()
    made.start()
    yield made
    made.stop()


def submit(engine, rows):
    engine.submit(rows)
    for row in rows:
        assert row.deliver.over.wait(30)
    return rows


def test_different_models_are_never_in_one_batch(engine, runner_of):
    runners = [runner_of("llama", router) for router in ("phatgoose", "merged")]
    wanted = [by_generate(runner, prompt_of(1), 12) for runner in runners]
    assert wanted[0] != wanted[1]
    rows = [row_of(runners[number % 2], prompt_of(1)) for number in range(6)]
    for row in rows:
        engine.submit([row])
    for number, row in enumerate(rows):
        assert row.deliver.over.wait(30)
        assert row.generated == wanted[number % 2]


@pytest.mark.parametrize(
    ("limits", "number", "client", "said"),
    [
        ({"max_queue": 3}, 2, "other", "2 answers are waiting already, 0 of them yours"),
        ({"max_queue": 5}, 2, "greedy", "2 answers are waiting already, 2 of them yours"),
        ({"max_queue": 5}, 4, "other", "0 of them yours; 4 more are too many"),
    ],
)
def test_what_comes_too_much_is_refused(runner_of, limits, number, client, said):
    engine = engine_of(**limits)
    engine.submit(short_rows(runner_of(), 2, "greedy"))
    with pytest.raises(ApiError, match=said) as refused:
        engine.submit(short_rows(runner_of(), number, client))
    assert (refused.value.status_code, refused.value.headers["Retry-After"]) == (429, "1")
    assert engine.waiting == 2


def short_rows(runner, number, client, tokens=12, prompt=8):
    wish = replace(GREEDY, max_tokens=tokens)
    return [row_of(runner, prompt_of(seed, prompt), wish, client=client) for seed in range(number)]


def computed(engine):
    """The clients of the rows that are computed, after one more look into the queue."""
    with torch.inference_mode():
        engine.admit()
    return [row.client for batch in engine.batches for row in batch.running]


def end(engine, client):
    engine.cancel([r for b in engine.batches for r in b.sequences if r.client == client])


def test_a_client_alone_leaves_a_quarter_for_others(runner_of):
    engine = engine_of(max_batch_tokens=400)  # twenty rows of twenty
    engine.submit(short_rows(runner_of(), 19, "greedy"))
    assert computed(engine) == ["greedy"] * 15
    engine.submit(short_rows(runner_of(), 1, "polite"))
    engine.submit(short_rows(runner_of(), 9, "second"))
    assert computed(engine) == ["greedy"] * 15 + ["polite"] + ["second"] * 3
    assert computed(engine)[19:] == []
    end(engine, "greedy")
    clients = computed(engine)
    assert clients.count("second") == 9  # at most three times what is left
    assert clients.count("greedy") == 4
    assert engine.waiting == 0


def test_clients_take_turns(runner_of):
    engine = engine_of(max_batch_tokens=60)
    order = []
    for client, number in (("a", 4), ("b", 4), ("c", 2)):
        rows = short_rows(runner_of(), number, client, tokens=1)
        for row in rows:
            row.deliver = lambda event, row=row: order.append(row.client)
        engine.submit(rows)
    while engine.waiting:
        computed(engine)
    assert "".join(order) == "abcabcabab"


def test_a_long_row_is_not_passed_over_for_ever(runner_of):
    engine = engine_of(max_batch_tokens=400)
    engine.submit(short_rows(runner_of(), 19, "greedy"))
    assert len(computed(engine)) == 15
    engine.submit(short_rows(runner_of(), 1, "long", tokens=372))
    engine.submit(short_rows(runner_of(), 1, "polite", tokens=1))
    engine.cancel(engine.batches[0].running[:5])  # it is the greedy one's turn, once
    assert computed(engine) == ["greedy"] * 11  # and the polite one, who was answered at once
    assert engine.waiting == 4
    end(engine, "greedy")
    assert computed(engine) == ["long"]
    end(engine, "long")
    assert computed(engine) == ["greedy"] * 3


def test_a_pass_that_fails_fails_its_own_rows_alone(engine, runner_of, monkeypatch):
    runner = runner_of("llama", "arrow")
    monkeypatch.setattr(runner, "decode", raises(RoutingError("no")))
    (row,) = submit(engine, [row_of(runner, prompt_of(1))])
    assert row.deliver.events[0].detail == "no"
    monkeypatch.setattr(runner, "decode", raises(ValueError("a secret")))
    (row,) = submit(engine, [row_of(runner, prompt_of(1))])
    assert "secret" not in row.deliver.events[0].detail
    (row,) = submit(engine, [row_of(runner_of(), prompt_of(1))])
    assert row.finish == "length"


def test_a_stopped_engine_fails_what_is_left(runner_of):
    engine = engine_of()
    engine.start()
    assert engine.is_alive
    row = row_of(runner_of(), prompt_of(0), replace(GREEDY, max_tokens=3000))
    engine.submit([row])
    engine.stop()
    assert isinstance(row.deliver.events[-1], ApiError)
    assert not engine.is_alive
    with pytest.raises(ApiError, match="too many now"):
        engine.submit([row_of(runner_of(), prompt_of(0))])
