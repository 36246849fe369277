"""What an answer reports while it is generated, and where it ends."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batched import GREEDY, alone, finish, prompt_of, row_of
from phatgoose.analysis.traces import trace
from phatgoose.apps.server.local.batches import Batch, Sampler
from phatgoose.apps.server.requests import Decoding
from phatgoose.tasks.encoding import Encoder

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_log_probabilities_are_those_of_one_pass(runner_of, kind):
    runner = runner_of(kind)
    wish = Decoding(5, 0.0, logprobs=3)
    rows = [row_of(runner, prompt_of(seed), wish) for seed in (1, 2)]
    batch = Batch(runner)
    batch.join(rows)
    finish(batch)
    for seed, row in zip((1, 2), rows, strict=True):
        ids = torch.tensor([[*prompt_of(seed), *row.generated]])
        logits = runner.model(ids).logits[0, -1 - len(row.generated) : -1]
        wanted, told = logits.float().log_softmax(-1), row.deliver.tokens
        for token, target, scores in zip(told, row.generated, wanted, strict=True):
            assert token.logprob == pytest.approx(scores[target].item(), abs=2e-4)
            best = scores.topk(3).values.tolist()
            assert [p for _, p in token.top] == pytest.approx(best, abs=2e-4)


def test_an_end_token_ends_an_answer_and_is_told_without_text(runner_of):
    runner = runner_of()
    whole = alone(runner, prompt_of(1)).generated
    runner.ends = frozenset([whole[3]])
    try:
        row = alone(runner, prompt_of(1), replace(GREEDY, logprobs=0))
        ignoring = alone(runner, prompt_of(1), replace(GREEDY, ignores_end=True))
    finally:
        runner.ends = frozenset()
    assert ignoring.generated == whole
    assert row.generated == whole[: whole.index(whole[3]) + 1]
    assert row.finish == "stop"
    assert len(row.deliver.tokens) == len(row.generated)


def advance(row, token):
    """Let `token` be the one that is chosen."""
    row.advance(torch.nn.functional.one_hot(torch.tensor(token), 300).float())


TEXTS = st.text(st.sampled_from("a \n.äß漢\u0301😀👩\u200d🚀"), min_size=1, max_size=12)


@given(TEXTS, TEXTS, st.sampled_from([(), ("😀",), ("a.", "漢漢")]))
def test_each_token_is_placed_where_its_character_begins(runner_of, prompt, answer, stop):
    """The tokenizer has a token for each byte, so most characters consist of several."""
    runner = runner_of()
    before, after = (runner.tokenizer(text)["input_ids"] for text in (prompt, answer))
    wish = Decoding(len(after), 0.0, stop=stop, logprobs=0)
    row = row_of(runner, before, wish)
    for token in after:
        if row.finish is None:
            advance(row, token)
    places = [place for place, each in enumerate(answer) for _ in each.encode()]
    told = row.deliver.tokens
    assert [token.place for token in told] == places[: len(told)]
    for token in told:
        assert token.text in (answer[token.place], "\ufffd")
    assert answer.startswith(row.deliver.text)
    assert row.finish == "stop" or row.deliver.text == answer


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_routing_is_that_of_one_pass(runner_of, kind):
    """Prompt and answer traced at once, as `explain` does, from rows that shared a batch."""
    runner = runner_of(kind)
    texts = ["to be, or not", "who?"]
    encoder = Encoder(runner.tokenizer, is_encoder_decoder=False)
    prompts = [encoder.prompt(text) for text in texts]
    rows = [row_of(runner, prompt, Decoding(6, 0.0, routing=True)) for prompt in prompts]
    batch = Batch(runner)
    batch.join([*rows, row_of(runner, prompt_of(5))])
    finish(batch)
    for prompt, text, row in zip(prompts, texts, rows, strict=True):
        got = row.deliver.routing
        experts = np.concatenate([s.experts for s in got])
        weights = np.concatenate([s.weights for s in got])
        assert weights[-1].max() == 0  # the last token never passed the model
        assert "".join(t for s in got for t in s.tokens) == text + "".join(row.shown)
        assert [p for s in got for p in s.parts] == [0] * len(row.prompt) + [1] * 6
        pair = replace(encoder.pair("a", "b"), prompt=prompt, target=row.generated)
        (wanted,) = trace(runner.model, encoder, pair).streams
        count = len(wanted.experts)
        same = experts[:count] == wanted.experts
        assert same.mean() > 0.98
        assert np.abs(weights[:count].astype(int) - wanted.weights)[same].mean() < 1


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
