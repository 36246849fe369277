"""Lookups that go by the base's activations: the base's own, whoever asks and however."""

from __future__ import annotations

import pytest
import torch

from phatgoose.base.blocks import prompt_stack
from phatgoose.errors import RoutingError
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.prompt_router import BaseReader, routed_sites
from phatgoose.routing.routers.router import Mixtures
from phatgoose.tasks.prompt_passes import PromptReading, last_token
from topic_prompts import PROMPTS, both_streams, scores_of


class LastHidden(PromptReading):
    """The first features of the last token after the first block, as scores."""

    blocks = (0,)

    def begin(self, mask):
        self.mask = mask

    def see_block(self, index, hidden):
        self.last = last_token(hidden, self.mask)[:, :4]

    def found(self):
        return self.last


class ByHidden(BaseReader):
    name = "by-hidden"

    def reading(self, model):
        return LastHidden()


@both_streams
@torch.no_grad()
def test_scores_are_the_bases_while_experts_act(base, pool):
    rows = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    wanted = []
    for row in rows:
        stack = prompt_stack(base.model)
        hidden = stack(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        wanted.append(hidden[1][0, -1, :4])
    model = compose(pool, base, router="discriminant")
    lookup = composition_of(model).lookup
    reader = ByHidden(base.tokenizer, k=2, temperature=2.0)
    with pytest.raises(RoutingError, match="by-hidden reads prompts with a model"):
        scores_of(reader, PROMPTS)
    reader._turn = lookup._turn  # of the model's own lookup, whose sites ask it
    reader._model = model
    lookup.serve(Mixtures.alone(torch.tensor([3])))
    torch.testing.assert_close(
        scores_of(reader, PROMPTS), torch.stack(wanted), atol=1e-5, rtol=1e-4
    )
    assert lookup.mixtures.experts.tolist() == [[3]]  # as before
    found = reader.find(rows)
    assert torch.equal(found.experts, torch.stack(wanted).topk(2).indices)
    expected = (torch.stack(wanted).topk(2).values / 2).softmax(-1)
    torch.testing.assert_close(found.weights, expected, atol=1e-5, rtol=1e-4)
    detach(model)


def test_the_sites_of_a_routed_model_are_found_by_name(llama, llama_pool):
    model = compose(llama_pool, llama)
    names = llama_pool.sites[:2]
    found = routed_sites(model, names)
    assert [(name, site.name) for name, site in found.items()] == [(n, n) for n in names]
