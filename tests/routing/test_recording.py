"""Recordings: the weights of every token at every site."""

from __future__ import annotations

import pytest
import torch

from oracle import token_weights
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of
from phatgoose.routing.recording import record
from tiny import logits_of, make_ids


def recorded(model, ids, **inputs):
    with record(model) as recording:
        logits_of(model, ids, **inputs)
    return recording


def test_recorded_weights_are_those_of_the_method_and_recording_changes_no_bit(base, pool):
    model, ids, inputs = compose(pool, base, k=2, router="phatgoose"), make_ids(), {}
    wanted = logits_of(model, ids)
    for site, layer in composition_of(model).layers.items():
        layer.register_forward_pre_hook(lambda _, args, site=site: inputs.update({site: args[0]}))
    with record(model) as recording:
        assert torch.equal(logits_of(model, ids), wanted)
    assert recording.weights.keys() == composition_of(model).layers.keys()
    for site, (weights,) in recording.weights.items():
        for got, u in zip(weights[0], inputs[site][0], strict=True):
            chosen = token_weights(u, pool.experts, site, k=2)
            assert {int(z) for z in got.nonzero()} == chosen.keys()
            assert got.tolist() == pytest.approx([chosen.get(z, 0) for z in range(4)], abs=1e-5)


def test_the_summary_is_the_mean_over_sites_and_a_rows_real_tokens(llama, llama_pool):
    model, ids = compose(llama_pool, llama, router="phatgoose"), make_ids(rows=2)
    alone = recorded(model, ids[1:, 2:])
    by_token = sum(passes[0][0] for passes in alone.weights.values()) / len(alone.weights)
    torch.testing.assert_close(alone.by_token(), by_token)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = recorded(model, ids, attention_mask=mask, position_ids=positions)
    for site, usage in padded.usage().items():
        rows = padded.weights[site][0].flatten(0, 1)
        torch.testing.assert_close(usage, rows.sum(dim=0) / mask.sum())
    wanted = dict(zip(llama_pool.names, by_token.mean(0).tolist(), strict=True))
    assert alone.summary() == pytest.approx(wanted, abs=1e-4)
    assert list(alone.summary()) == sorted(wanted, key=wanted.get, reverse=True)
    assert padded.summary(row=1) == pytest.approx(wanted, abs=1e-3)


def test_a_recording_of_nothing_is_empty(llama, llama_pool):
    with record(compose(llama_pool, llama, router="phatgoose")) as recording:
        pass
    assert (recording.usage(), recording.summary()) == ({}, {})
    assert recording.by_token().shape == (0, 4)


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
@pytest.mark.parametrize("targets", [3, 7])
@pytest.mark.parametrize("module", ["q", "k"])  # most of k's sites read the encoder
def test_by_token_of_an_encoder_decoder_is_of_the_decoder(base, make_expert, targets, module):
    experts = [make_expert(base, f"e{z}", seed=z, target_modules=[module]) for z in range(3)]
    model, ids = compose(Pool(tuple(experts)), base, router="phatgoose"), make_ids(tokens=7)
    recording = recorded(model, ids, decoder_input_ids=ids[:, :targets])
    decoder = [
        passes[0][0]
        for site, passes in recording.weights.items()
        if "decoder" in site and (module == "q" or "EncDec" not in site)
    ]
    assert (len(decoder) > len(recording.weights) / 2) == (module == "q")
    torch.testing.assert_close(recording.by_token(), sum(decoder) / len(decoder))


def test_every_token_of_a_generation_is_recorded_once(llama, llama_pool):
    model, ids = compose(llama_pool, llama, router="phatgoose"), make_ids(tokens=5)
    with record(model) as recording, torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6
        )
    one_pass = recorded(model, output[:, :-1])  # nothing follows the last token
    assert recording.by_token().shape == (10, 4)
    torch.testing.assert_close(recording.by_token(), one_pass.by_token(), rtol=0, atol=1e-4)


def test_recordings_that_end_out_of_order_leave_compiling_as_it_was(llama, llama_pool):
    model, ids, compiled = compose(llama_pool, llama, router="phatgoose"), make_ids(), [0]

    def counting(graph, _):
        compiled[0] += 1
        return graph.forward

    called = torch.compile(lambda: model(ids).logits, backend=counting)
    first, second = record(model), record(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    called()
    assert not compiled[0]
    second.__exit__(None, None, None)
    called()
    assert compiled[0]
