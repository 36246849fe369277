"""Results computed ahead of those who take them."""

from __future__ import annotations

import threading

import pytest
import torch

from phatgoose.files.tensor_file import prefetch


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request, monkeypatch) -> int:
    """What torch says of its threads, of which these tests use one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def test_results_come_in_the_order_of_their_items_and_few_wait_to_be_taken():
    started = []

    def square(number: int) -> int:
        started.append(number)
        return number * number

    results = prefetch(square, range(20))
    assert next(results) == 0
    assert len(started) <= torch.get_num_threads() + 1
    assert list(results) == [number * number for number in range(1, 20)]


def test_one_thread_is_the_one_that_takes_the_results(threads):
    used = set(prefetch(lambda _: threading.get_ident(), range(20)))
    assert (used == {threading.get_ident()}) == (threads == 1)


def test_an_error_is_raised_in_its_place():
    results = prefetch(lambda number: 1 // number, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []
