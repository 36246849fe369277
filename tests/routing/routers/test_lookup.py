"""What serves each row of a batch: of one thread at a time, and of no copy."""

from __future__ import annotations

import pickle
from threading import Thread

import torch

from phatgoose.routing.routers.router import Lookup, Mixtures


def test_a_batch_is_that_of_the_thread_that_announced_it():
    lookup, seen = Lookup(), []
    lookup.serve(Mixtures.alone(torch.tensor([1, 0])))
    other = Thread(target=lambda: seen.append(lookup.mixtures))
    other.start()
    other.join()
    assert seen == [None]
    assert lookup.mixtures.experts.tolist() == [[1], [0]]


def test_a_copy_has_no_batch_yet():
    lookup = Lookup()
    lookup.serve(Mixtures.alone(torch.tensor([2])))
    assert pickle.loads(pickle.dumps(lookup)).mixtures is None
