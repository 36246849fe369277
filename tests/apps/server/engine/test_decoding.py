"""The next token, and log-probabilities of alternatives."""

from __future__ import annotations

import torch

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server.sequences import Decoding, Sampler, seed_of, token_scores


def test_sampling_follows_temperature_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    def shares(**wish):
        sampler = Sampler(Decoding(1, seed=3, **wish), torch.device("cpu"))
        drawn = torch.tensor([sampler(logits) for _ in range(600)])
        return drawn.bincount(minlength=4) / 600

    torch.testing.assert_close(shares(temperature=1.0), logits.softmax(0), atol=0.08, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits / 2).softmax(0), atol=0.08, rtol=0)
    assert shares(temperature=1.0, top_p=0.7)[2:].sum() == 0
    assert shares(temperature=1.0, top_p=0.0)[0] == 1
    assert shares(temperature=1e-30)[0] == 1


def test_seeds_of_one_request_differ_and_a_missing_one_is_drawn():
    assert [seed_of(5, i) for i in range(3)] == [5, 6, 7]
    assert seed_of(-1, 0) >= 0
    assert seed_of(None, 0) != seed_of(None, 0)


def test_infinite_log_probabilities_are_told_as_numbers():
    logits = torch.tensor([[0.0, -torch.inf]])
    ((own, top),) = token_scores(logits, [1], 2)
    assert own.logprob == top[1].logprob == -9999
