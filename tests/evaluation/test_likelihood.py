"""Log-likelihoods of choices, against one whole pass per choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oracle import naively_routed
from phatgoose.errors import BaseModelError, EvaluationError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.likelihood import choice_log_likelihoods
from phatgoose.routing.compose import compose
from scored_tasks import CHOICE_TASK, naive_scores
from tiny import copied_model, logits_of


@pytest.mark.parametrize("budget", [1, 90, 4096])
def test_rank_classification_is_the_naive_one(base, budget):
    score = evaluate(base, CHOICE_TASK, token_budget=budget).scores[0]
    right = 0
    for example, prediction in zip(CHOICE_TASK.test, score.predictions, strict=True):
        wanted = naive_scores(base.model, base, example)
        assert prediction.scores == pytest.approx(wanted, abs=1e-4)
        assert prediction.answer == example.choices[wanted.index(max(wanted))]
        assert prediction.correct == (prediction.answer == example.target)
        right += prediction.correct
    assert (score.score, score.n) == (right / 5, 5)
    assert score.metric == "rank classification accuracy"


@pytest.mark.parametrize("budget", [1, 4096])
def test_a_model_that_cannot_be_packed_is_scored_alike(llama, monkeypatch, budget):
    wanted = evaluate(llama, CHOICE_TASK).scores[0].predictions
    monkeypatch.setattr("phatgoose.tasks.batching.can_pack", lambda _: False)
    got = evaluate(llama, CHOICE_TASK, token_budget=budget).scores[0].predictions
    for one, other in zip(got, wanted, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_a_prompt_without_tokens_is_refused(llama):
    with pytest.raises(EvaluationError, match="no tokens"):
        list(choice_log_likelihoods(llama.model, [([], [[7], [9]])], 0, 100))


def test_a_base_that_names_no_token_to_begin_answers_with_is_refused():
    model = copied_model("t5")
    model.config.decoder_start_token_id = None
    with pytest.raises(BaseModelError, match="has no decoder_start_token_id"):
        list(choice_log_likelihoods(model, [([5], [[7], [9]])], 0, 100))


def test_a_routed_model_is_scored_as_the_naively_routed_one(base, pool):
    with naively_routed(base.model, pool.experts, k=2):
        wanted = [naive_scores(base.model, base, example) for example in CHOICE_TASK.test]
    score = evaluate(compose(pool, base), CHOICE_TASK).scores[0]
    for prediction, scores in zip(score.predictions, wanted, strict=True):
        assert prediction.scores == pytest.approx(scores, abs=1e-4)


def test_choices_of_a_single_token_need_no_second_pass(base):
    prompt = base.tokenizer("is it?")["input_ids"]
    ((index, scores),) = choice_log_likelihoods(base.model, [(prompt, [[7], [9], [1]])], 0, 100)
    if base.is_encoder_decoder:
        start = torch.tensor([[0]])
        row = logits_of(base.model, torch.tensor([prompt]), decoder_input_ids=start)[0, -1]
    else:
        row = logits_of(base.model, torch.tensor([prompt]))[0, -1]
    assert index == 0
    assert scores == pytest.approx(row.log_softmax(-1)[[7, 9, 1]].tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_a_decoder_reads_choices_of_similar_length_together(base):
    prompt, shapes = base.tokenizer("is it?")["input_ids"], []
    choices = [[token] * length for token, length in enumerate((9, 1, 8, 2, 1), start=3)]
    base.model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    list(choice_log_likelihoods(base.model, [(prompt, choices)], 0, 100))
    assert shapes == [(2, 9), (1, 2), (2, 1)]


def test_the_order_of_choices_changes_no_score(llama):
    turned = replace(
        CHOICE_TASK, test=tuple(replace(e, choices=e.choices[::-1]) for e in CHOICE_TASK.test)
    )
    one, other = (evaluate(llama, task).scores[0].predictions for task in (CHOICE_TASK, turned))
    for prediction, reversed_ in zip(one, other, strict=True):
        assert reversed_.scores[::-1] == pytest.approx(prediction.scores, abs=1e-5)
        assert reversed_.answer == prediction.answer
