"""How often routers choose the same experts, against recordings."""

from __future__ import annotations

import pytest
import torch

import phatgoose as pg
from analysed import TASKS
from phatgoose.analysis.agreement import DecisionFiles, agreement
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
