"""Bases with a mixture of experts of their own, whose layers see some of the tokens only."""

from collections import Counter

import pytest
import torch

from architectures import make_tiny, random_expert, reading_pool
from phatgoose.analysis.traces import trace
from phatgoose.base.identity import Base, fingerprint
from phatgoose.errors import RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.routing.choice import Choice
from phatgoose.routing.compose import compose, composition_of
from phatgoose.routing.recording import record
from phatgoose.tasks.encoding import Encoder
from scored_tasks import CHOICE_TASK, naive_scores
from tiny import logits_of, make_ids, make_tokenizer


@pytest.fixture(params=["switch_transformers", "nllb-moe"])
def base(request):
    model = make_tiny(request.param)
    return Base(model, make_tokenizer(final_eos=True), "tiny", None, fingerprint(model))


def routed(base, **options):
    pool = reading_pool(random_expert(base.model, seed) for seed in range(3))
    return compose(pool, base, **options)


def test_sites_that_see_some_tokens_are_left_out_of_what_is_told_of_tokens(base):
    model, encoder = routed(base, router="phatgoose"), Encoder.of(base)
    whole = Counter(layer.site.stream for layer in composition_of(model).layers.values())
    for stream in trace(model, encoder, encoder.pair("Is a heron a bird?" * 9, "a bird")).streams:
        assert len(stream.tokens) == len(stream.experts)
        if base.model.config.model_type == "switch_transformers":  # one expert for each token
            assert 0 < len(stream.sites) < whole[stream.name]


def test_a_recording_is_summed_up_over_sites_that_see_all_tokens(base):
    model, ids = routed(base, router="phatgoose"), make_ids(rows=2, tokens=3)  # as many as experts
    with record(model) as recording:
        logits_of(model, ids, decoder_input_ids=ids)
    whole = [
        passes[0][1]
        for site, passes in recording.weights.items()
        if recording.streams[site] == "decoder" and passes[0].shape == (2, 3, 3)
    ]
    torch.testing.assert_close(recording.by_token(row=1), sum(whole) / len(whole))
    assert sum(recording.summary(row=1).values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("base", ["switch_transformers"], indirect=True)
def test_prompts_with_experts_of_their_own_pass_one_by_one(base):
    """Nothing says whose token the base's own expert sees.

    (NLLB-MoE's experts take so many tokens of a batch, so what it says depends on the batch.)
    """
    model = routed(base, router="discriminant:fallback=off", k=2)
    parts, encoder = composition_of(model), Encoder.of(base)
    prompts = [encoder.prompt(example.input) for example in CHOICE_TASK.test]
    choice = parts.chooser.choose(prompts)
    assert len(choice.weights[:, 0].unique()) > 1
    with pytest.raises(RoutingError, match="pass inputs one by one"):
        evaluate(model, CHOICE_TASK, tokenizer=base.tokenizer)
    scored = evaluate(model, CHOICE_TASK, tokenizer=base.tokenizer, token_budget=1).scores[0]
    each = zip(choice.experts[:, None], choice.weights[:, None], strict=True)
    for example, prediction, one in zip(CHOICE_TASK.test, scored.predictions, each, strict=True):
        parts.context.use(Choice(*one))
        wanted = naive_scores(model, base, example)
        parts.context.use(None)
        assert prediction.scores == pytest.approx(wanted, abs=1e-4)
