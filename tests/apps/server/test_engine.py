"""The engine: who is computed when, and what happens when it fails."""

from dataclasses import replace

import pytest

from batched import GREEDY, by_generate, prompt_of, row_of
from phatgoose.apps.server.local import FAILED, GenerationEngine
from phatgoose.apps.server.protocol import ApiError
from phatgoose.config import Serving
from phatgoose.errors import RoutingError

pytestmark = pytest.mark.usefixtures("no_gradients")


def engine_of(**limits):
    return GenerationEngine(Serving(**{"max_batch_tokens": 4096, **limits}))


@pytest.fixture
def engine():
    """A running engine."""
    running = engine_of()
    running.start()
    yield running
    running.stop()


def ended(rows):
    for row in rows:
        assert row.deliver.over.wait(30)
    return rows


def test_different_models_are_never_in_one_batch(engine, runner_of):
    runners = [runner_of("llama", router) for router in ("phatgoose", "merged")]
    wanted = [by_generate(runner, prompt_of(1)) for runner in runners]
    assert wanted[0] != wanted[1]
    rows = [row_of(runners[number % 2], prompt_of(1)) for number in range(6)]
    for row in rows:
        engine.submit([row])
    assert [row.generated for row in ended(rows)] == wanted * 3


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
    submit(engine, runner_of(), 2, "greedy")
    with pytest.raises(ApiError, match=said) as refused:
        submit(engine, runner_of(), number, client)
    assert (refused.value.status_code, refused.value.headers["Retry-After"]) == (429, "1")
    assert engine.waiting == 2


def submit(engine, runner, number, client, tokens=12):
    """Queue so many prompts of eight tokens."""
    wish = replace(GREEDY, max_tokens=tokens)
    rows = [row_of(runner, prompt_of(seed, 8), wish, client) for seed in range(number)]
    engine.submit(rows)
    return rows


def computed(engine):
    """The clients of the rows that are computed, after one more look into the queue."""
    engine.admit()
    return [row.client for batch in engine.batches for row in batch.running]


def end(engine, client):
    engine.cancel([r for b in engine.batches for r in b.sequences if r.client == client])


def test_a_client_alone_leaves_a_quarter_for_others(runner_of):
    engine = engine_of(max_batch_tokens=400)  # twenty rows of twenty
    submit(engine, runner_of(), 19, "greedy")
    assert computed(engine) == ["greedy"] * 15
    submit(engine, runner_of(), 1, "polite")
    submit(engine, runner_of(), 9, "second")
    assert computed(engine) == ["greedy"] * 15 + ["polite"] + ["second"] * 3
    assert computed(engine)[19:] == []
    end(engine, "greedy")
    clients = computed(engine)
    assert clients.count("second") == 9  # at most three times what is left
    assert clients.count("greedy") == 4
    assert engine.waiting == 0


def test_clients_take_turns(runner_of):
    engine, rows = engine_of(max_batch_tokens=60), []
    for client, number in (("a", 4), ("b", 4), ("c", 2)):
        rows += submit(engine, runner_of(), number, client, tokens=1)
    order = []
    for row in rows:
        row.deliver = lambda event, row=row: order.append(row.client)
    while engine.waiting:
        computed(engine)
    assert "".join(order) == "abcabcabab"


def test_a_long_row_is_not_passed_over_for_ever(runner_of):
    engine = engine_of(max_batch_tokens=400)
    submit(engine, runner_of(), 19, "greedy")
    assert len(computed(engine)) == 15
    submit(engine, runner_of(), 1, "long", tokens=372)
    submit(engine, runner_of(), 1, "polite", tokens=1)
    engine.cancel(engine.batches[0].running[:5])  # it is the greedy one's turn, once
    assert computed(engine) == ["greedy"] * 11  # and the polite one, who was answered at once
    assert engine.waiting == 4
    end(engine, "greedy")
    assert computed(engine) == ["long"]
    end(engine, "long")
    assert computed(engine) == ["greedy"] * 3


@pytest.mark.parametrize(
    ("error", "told"),
    [(RoutingError("no"), "no"), (ValueError("a secret"), FAILED)],
)
def test_a_pass_that_fails_fails_its_own_rows_alone(engine, runner_of, monkeypatch, error, told):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(runner_of("llama", "arrow"), "decode", fail)
    rows = [row_of(runner_of("llama", router), prompt_of(1)) for router in ("arrow", "phatgoose")]
    for row in rows:
        engine.submit([row])
    failed, other = ended(rows)
    assert failed.deliver.events[0].detail == told
    assert other.finish == "length"


def test_a_stopped_engine_fails_what_is_left(runner_of):
    engine = engine_of()
    engine.start()
    assert engine.is_alive
    (row,) = submit(engine, runner_of(), 1, "", tokens=3000)
    engine.stop()
    assert isinstance(row.deliver.events[-1], ApiError)
    assert not engine.is_alive
    with pytest.raises(ApiError, match="too many now"):
        submit(engine, runner_of(), 1, "")
