"""How often routers choose the same experts, against recordings."""

from __future__ import annotations

import pytest
import torch

import phatgoose as pg
from analysed import TASKS
from phatgoose.analysis.measures import DecisionFiles, agreement
from phatgoose.base.sites import Site
from phatgoose.routing.compose import compose
from phatgoose.routing.recording import record
from phatgoose.routing.watching import SitePass
from phatgoose.tasks.encoding import Encoder


def test_agreement_is_that_of_recordings(found, llama, llama_pool):
    tops, weights = {}, {}
    for router in ("phatgoose", "arrow"):
        model = compose(llama_pool, llama, router=router)
        encoder = Encoder(llama.tokenizer, is_encoder_decoder=False)
        pairs = [encoder.pair(e.input, e.target) for t in TASKS for e in t.evaluation_examples()]
        with record(model) as recording, torch.no_grad():
            for pair in pairs:
                model(input_ids=torch.tensor([pair.prompt + pair.target[:-1]]))
        rows = [torch.cat([part[0] for part in passes]) for passes in recording.weights.values()]
        weights[router] = torch.cat(rows)
        tops[router] = weights[router].argmax(dim=1)
        pg.detach(model)
    common = found.agreements["phatgoose", "arrow"]
    same = (tops["phatgoose"] == tops["arrow"]).float().mean().item()
    shared = torch.minimum(*weights.values()).sum(dim=1).mean().item()
    assert common.decisions == len(weights["arrow"])
    assert common.first == pytest.approx(same, abs=0.01)
    assert common.overlap == pytest.approx(shared, abs=0.01)


def test_routers_without_a_choice_in_common_have_no_agreement(tmp_path):
    site = Site("a", 2, 2, "decoder")
    for name, weights in (("one", torch.tensor([[0.0]])), ("other", torch.tensor([[1.0]]))):
        files = DecisionFiles(tmp_path / name, torch.tensor([1]))
        files.begin_pass({})
        experts = torch.tensor([[0]])
        files.add(SitePass(site, experts, weights, None, (1, 1), lambda w=weights: w))
        files.end_pass()
    assert agreement(tmp_path / "one", tmp_path / "other", 2) is None
    same = agreement(tmp_path / "other", tmp_path / "other", 2)
    assert (same.first, same.overlap, same.decisions) == (1, 1, 1)


def decided(folder, weights, experts=(0, 1, 2)):
    """The file of one pass of tokens with these `weights` [T, k] of these experts, in `folder`."""
    site, weights = Site("a", 2, 2, "decoder"), torch.tensor(weights)
    files = DecisionFiles(folder, torch.arange(3))
    files.begin_pass({})
    chosen = torch.tensor([experts[: weights.shape[1]]] * len(weights))
    files.add(SitePass(site, chosen, weights, None, (1, len(weights)), lambda: weights))
    files.end_pass()
    return folder


def test_equals_share_the_first_choice(tmp_path):
    tied = decided(tmp_path / "tied", [[0.5, 0.5]])
    first = decided(tmp_path / "first", [[0.7, 0.3]])
    last = decided(tmp_path / "last", [[0.3, 0.7]])
    three = decided(tmp_path / "three", [[1 / 3, 1 / 3, 1 / 3]])
    assert agreement(tied, tied, 3).first == 1
    assert agreement(tied, first, 3).first == agreement(tied, last, 3).first == 0.5
    assert agreement(three, tied, 3).first == pytest.approx(2 / 3)
    assert agreement(first, last, 3).first == 0


def test_close_weights_are_no_equals(tmp_path):
    close = decided(tmp_path / "close", [[0.5, 0.5 + 1e-5]])  # equal in half precision
    first = decided(tmp_path / "first", [[0.7, 0.3]])
    assert agreement(close, first, 3).first == 0


def test_uniform_top_k_agrees_with_phatgoose_by_half(llama, llama_pool):
    routers = ["phatgoose", "uniform-top-k"]
    found = pg.analyse(llama_pool, TASKS, routers=routers, base=llama, score=False)
    at_first = found.agreements["phatgoose", "uniform-top-k"].first
    assert 0.3 < at_first <= 0.5  # the same two in most places, of which one comes first
