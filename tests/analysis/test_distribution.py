"""Routing summed up as it passes, compared to recordings that keep every token."""

import numpy as np
import pytest
import torch

from analysed import pass_alone
from phatgoose.analysis.distribution import read_task, site_label
from phatgoose.routing.compose import compose, composition_of
from phatgoose.routing.recording import watch
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.task import Example, Task

EXAMPLES = [
    Example(f"Film {number} {'very ' * number}is", ("good", "bad indeed")[number % 2])
    for number in range(5)
]


def tallied(model, base, budget=4096):
    task, experts = Task("second", test=tuple(EXAMPLES)), composition_of(model).experts
    return read_task(model, Encoder.of(base), task, experts, budget)[0]


@pytest.mark.parametrize("budget", [1, 80, 4096])
def test_a_tally_has_the_sums_of_all_tokens_however_they_are_batched(base, pool, budget):
    model = compose(pool, base, router="phatgoose")
    profile, layers = tallied(model, base, budget=budget), composition_of(model).layers
    seen = {site: [] for site in layers}
    for example in EXAMPLES:
        passes = []
        with watch(model, passes.append):
            parts = pass_alone(model, Encoder.of(base).pair(example.input, example.target))
        for one in passes:
            dense = torch.zeros(len(one.weights), 4)
            dense[:, layers[one.site.name].experts] = one.distribution()
            part = torch.tensor(parts[one.site.stream])
            seen[one.site.name].append((one.dense_weights(4), dense, part))
    assert profile.tokens.keys() == layers.keys()
    for site, each in seen.items():
        weights, probabilities, parts = map(torch.cat, zip(*each, strict=True))
        for part in (0, 1):
            of_part = parts == part
            assert profile.tokens[site][part] == of_part.sum()
            for measure, rows in (("weight", weights), ("probability", probabilities)):
                wanted = rows[of_part].sum(dim=0).numpy()
                np.testing.assert_allclose(
                    profile.sums[measure][site][part], wanted, atol=2e-3, rtol=1e-3
                )
            entropies = torch.special.entr(probabilities[of_part]).sum()
            assert profile.entropies[site][part] == pytest.approx(entropies.item(), abs=5e-3)


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_prompts_are_the_encoders_and_answers_the_decoders(base, pool):
    profile = tallied(compose(pool, base, router="phatgoose"), base)
    layers = {"encoder 0", "encoder 1", "decoder 0", "decoder 1"}
    assert profile.by_layer().keys() == layers
    prompts, answers = ({*profile.by_site(part=part)} for part in ("prompt", "answer"))
    crossing = [site for site in prompts if site_label(site).stack == "decoder"]
    assert len(crossing) == 2 * 2  # keys and values of the cross-attention
    assert all("EncDecAttention" in site for site in crossing)
    assert {site_label(site).stack for site in answers} == {"decoder"}
