"""Traces: a text's tokens and the weights of their experts."""

import base64
import json

import numpy as np
import pytest
import torch

from analysed import pass_alone
from phatgoose.analysis.distribution import PARTS, site_label
from phatgoose.analysis.traces import trace
from phatgoose.routing.compose import compose
from phatgoose.routing.recording import record
from phatgoose.tasks.encoding import Encoder

PROMPT, ANSWER = "Is a heron é a bird?", "a bird"


def traced(base, pool, **options):
    model = compose(pool, base, **{"router": "phatgoose", **options})
    pair = Encoder.of(base).pair(PROMPT, ANSWER)
    return model, pair, trace(model, Encoder.of(base), pair)


def test_a_trace_has_the_weights_of_a_recording(base, pool):
    model, pair, got = traced(base, pool)
    with record(model) as recording:
        pass_alone(model, pair)
    for stream in got.streams:
        sites = [site for site in recording.weights if recording.streams[site] == stream.name]
        assert [site_label(site) for site in sites] == list(stream.sites)
        wanted = torch.stack([recording.weights[site][0][0] for site in sites]).mean(dim=0)
        np.testing.assert_allclose(stream.shares(4), wanted, atol=2 / 255)
        np.testing.assert_allclose(stream.shares(4).sum(axis=1), 1)


@pytest.mark.parametrize(
    ("mixture", "wanted"),
    [("e0=1,e1=1", [0.5, 0.5]), ("e0=0.5,e1=-0.5", [0.5, 0.5]), ("e0=3,e1=-1", [0.75, 0.25])],
)
def test_sizes_of_a_mixture_of_ones_own_are_shown(llama, llama_pool, mixture, wanted):
    (stream,) = traced(llama, llama_pool, router=f"weights:{mixture}")[2].streams
    shown = stream.shares(4)
    np.testing.assert_allclose(shown, np.broadcast_to([*wanted, 0, 0], shown.shape), atol=2 / 255)


def test_a_trace_in_json_can_be_read_back(llama, llama_pool):
    got = traced(llama, llama_pool)[2]
    data = json.loads(json.dumps(got.to_dict()))
    (stream,), (wanted,) = data["streams"], got.streams
    shape = (len(stream["tokens"]), len(stream["sites"]), stream["kept"])
    experts = np.frombuffer(base64.b64decode(stream["experts"]), "<u2").reshape(shape)
    weights = np.frombuffer(base64.b64decode(stream["weights"]), np.uint8).reshape(shape)
    np.testing.assert_array_equal(experts, wanted.experts)
    np.testing.assert_array_equal(weights, wanted.weights)
    assert (weights.sum(axis=2) == 255).all()
    layer, kind = stream["sites"][-1]
    assert (stream["layers"][layer], stream["kinds"][kind]) == ("1", "mlp.down_proj")
    assert data["parts"] == list(PARTS)
