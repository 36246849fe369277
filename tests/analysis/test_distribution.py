"""Routing summed up as it passes, compared to recordings that keep every token."""

import numpy as np
import pytest
import torch

from analysed import EXAMPLES, encoder_of, tallied
from phatgoose.analysis.distribution import site_label
from phatgoose.routing.compose import compose, composition_of
from phatgoose.routing.recording import record, watch
from phatgoose.routing.routers.registry import OURS
from routed_models import compose_by


def by_hand(model, base, pair):
    """(weights, probabilities, parts) by site, of one example alone, without padding."""
    prompt, answer = pair.prompt, pair.target[:-1]
    distributions = {}

    def see(passed):
        dense = torch.zeros(len(passed.weights), 4)
        site = passed.site.name
        dense[:, composition_of(model).layers[site].experts] = passed.distribution()
        distributions[site] = dense

    inputs = {"input_ids": torch.tensor([prompt + answer])}
    parts = {"decoder": [0] * len(prompt) + [1] * len(answer)}
    if base.is_encoder_decoder:
        inputs = {"input_ids": torch.tensor([prompt])}
        inputs["decoder_input_ids"] = torch.tensor([[0, *answer]])
        parts = {"encoder": [0] * len(prompt), "decoder": [1] * (len(answer) + 1)}
    with torch.no_grad():
        with record(model) as recording:
            model(**inputs)
        with watch(model, see):
            model(**inputs)
    return {
        site: (
            recording.weights[site][0][0],
            distributions[site],
            torch.tensor(parts[recording.streams[site]]),
        )
        for site in recording.weights
    }


@pytest.mark.parametrize("budget", [1, 80, 4096])
def test_a_tally_has_the_sums_of_all_tokens_however_they_are_batched(base, pool, budget):
    model = compose(pool, base, router="phatgoose")
    profile = tallied(model, base, budget=budget)
    pairs = [encoder_of(base).pair(each.input, each.target) for each in EXAMPLES]
    seen = [by_hand(model, base, pair) for pair in pairs]
    assert profile.tokens.keys() == composition_of(model).layers.keys()
    for site in profile.tokens:
        weights, probabilities, parts = (torch.cat([s[site][i] for s in seen]) for i in range(3))
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


@pytest.mark.usefixtures("toy_embedder")
@pytest.mark.parametrize("router", OURS)
def test_every_router_has_a_distribution(llama, llama_pool, router):
    model = compose_by(router, llama_pool, llama)
    profile = tallied(model, llama)
    for site, mean in profile.by_site("probability").items():
        assert mean.sum() == pytest.approx(1, abs=1e-4), site
    if router in ("oracle", "single", "best-individual", "retrieval", "merged"):
        weight, probability = profile.whole("weight"), profile.whole("probability")
        np.testing.assert_allclose(weight, probability, atol=1e-6)
    if router in ("random", "merged"):
        np.testing.assert_allclose(profile.whole("probability"), 0.25, atol=1e-6)
    if router in ("oracle", "single", "best-individual"):
        assert profile.token_entropy() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_prompts_are_the_encoders_and_answers_the_decoders(base, pool):
    profile = tallied(compose(pool, base, router="phatgoose"), base)
    layers = {"encoder 0", "encoder 1", "decoder 0", "decoder 1"}
    assert profile.by_layer().keys() == layers
    of_prompts = profile.by_site(part="prompt")
    assert {site_label(site).stack for site in of_prompts} == {"encoder", "decoder"}
    crossing = [site for site in of_prompts if site_label(site).stack == "decoder"]
    assert crossing
    assert all("EncDecAttention" in site for site in crossing)
    assert all(site_label(site).stack == "decoder" for site in profile.by_site(part="answer"))


@pytest.mark.parametrize(
    ("site", "stack", "layer", "kind"),
    [
        ("model.layers.7.self_attn.q_proj", "", 7, "self_attn.q_proj"),
        ("transformer.h.11.mlp.c_fc", "", 11, "mlp.c_fc"),
        ("encoder.block.3.layer.0.SelfAttention.q", "encoder", 3, "SelfAttention.q"),
        ("decoder.block.2.layer.1.EncDecAttention.k", "decoder", 2, "EncDecAttention.k"),
        ("odd.name", "", -1, "odd.name"),
    ],
)
def test_places_are_read_off_names(site, stack, layer, kind):
    place = site_label(site)
    assert (place.stack, place.layer, place.kind) == (stack, layer, kind)
