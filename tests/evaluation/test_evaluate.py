"""Evaluation: examples drawn, scored and written down."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from oracle import naively_routed
from phatgoose.config import Formatting
from phatgoose.errors import ConfigError, EvaluationError, TaskError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.metrics import Sample, metric
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.tasks.batching import can_pack
from phatgoose.tasks.task import Example, Task
from scored_tasks import CHOICE_TASK, greedy_text, naive_scores


def test_a_limit_and_a_seed_draw_the_same_examples_for_every_model(llama):
    examples = tuple(Example(f"input number {i}", "a", ("a", "b")) for i in range(30))
    task = Task("many", test=examples)

    def scores_of(**options: int) -> list[tuple[float, ...]]:
        (score,) = evaluate(llama, task, token_budget=1, **options).scores
        return [prediction.scores for prediction in score.predictions]

    whole = scores_of()
    drawn = [task.evaluation_examples(4, seed) for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    for seed, few in enumerate(drawn):
        wanted = [whole[examples.index(example)] for example in few]
        assert scores_of(limit=4, seed=seed) == wanted


# Tasks that say how they are scored


@pytest.mark.parametrize(
    "metrics",
    [("rouge-l", "bleu"), ("squad-exact-match", "squad-f1"), ("normalised-exact-match",)],
    ids="+".join,
)
@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_a_task_is_scored_by_the_mean_of_its_metrics(base, metrics):
    answers = [greedy_text(base.model, base, text, 5) for text in ("a", "b c d")]
    longer = f"{answers[0]} and more"
    examples = (
        Example("a", answers[0]),
        Example("b c d", "not so", references=("not so", answers[1])),
        Example("something else", "never this"),
        Example("a", longer, choices=(answers[0], longer)),
    )
    task = Task("written", test=examples, metrics=metrics, max_new_tokens=5)
    (score,) = evaluate(base, task).scores
    assert [prediction.correct for prediction in score.predictions] == [True, True, False, False]
    assert score.metric == " + ".join(metric(name).label for name in metrics)
    assert score.score == pytest.approx(np.mean(list(score.by_metric.values())), abs=1e-12)
    for place, name in enumerate(metrics):
        rows = zip(score.predictions, examples, strict=True)
        marks = [metric(name).measure(row.answer, example.answers) for row, example in rows]
        assert [prediction.marks[place] for prediction in score.predictions] == marks
        by_hand = float(metric(name).combine(np.array(marks).sum(axis=0), len(marks)))
        assert score.by_metric[name] == pytest.approx(by_hand, abs=1e-9)


def test_what_cannot_be_scored_is_refused(llama):
    choose = CHOICE_TASK.test
    for examples, metrics, match in (
        (choose, ("rouge",), r"Metric 'rouge' is unknown; known are accuracy, exact-match"),
        (choose, ("accuracy", "bleu"), "'odd' is scored by accuracy and bleu, but accuracy ranks"),
        (
            (*choose, Example("open", "end")),
            (),
            "is scored by accuracy, but accuracy ranks",
        ),
        ((Example("", "a", ("a", "b")),), (), "no tokens"),
    ):
        with pytest.raises(EvaluationError, match=match):
            evaluate(llama, Task("odd", test=examples, metrics=metrics))
    for tasks, limit, error, match in (
        ([], None, TaskError, "No task is given"),
        (Task("none"), None, TaskError, "'none' has no examples"),
        (CHOICE_TASK, 0, ConfigError, "limit is 0"),
        (CHOICE_TASK, -1, ConfigError, "limit is -1"),
    ):
        with pytest.raises(error, match=match):
            evaluate(llama, tasks, limit=limit)
    llama.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"'choose'.*not numbers"):
        evaluate(llama, CHOICE_TASK)


@pytest.mark.parametrize(
    ("metrics", "wilson"),
    [
        (("exact-match",), True),
        (("squad-f1",), False),
        (("bleu",), True),  # 0 here, in every resample
        (("exact-match", "normalised-exact-match"), False),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_the_interval_is_wilsons_for_a_share_of_right_answers_and_else_a_bootstrap(
    llama, metrics, wilson
):
    answer = greedy_text(llama.model, llama, "a", 5)
    targets = [f"{answer} left", answer, answer, f"{answer} down", *["qq ww ee"] * 3]
    examples = tuple(Example("a", target) for target in targets)
    task = Task("seven", test=examples, metrics=metrics, max_new_tokens=5)
    (score,) = evaluate(llama, task).scores
    sample = Sample.of(metrics, [prediction.marks for prediction in score.predictions])
    bootstrap = sample.estimate()
    if wilson:
        share = binomtest(round(score.score * 7), 7).proportion_ci(0.95, method="wilson")
        assert (score.low, score.high) == pytest.approx((share.low, share.high))
        assert (score.low, score.high) != pytest.approx((bootstrap.low, bootstrap.high))
    else:
        assert (score.low, score.high) == (bootstrap.low, bootstrap.high)
    assert 0 <= score.low <= score.score <= score.high <= 1


LONG = Task("long", test=tuple(Example("a" * n, "yes", ("yes", "no")) for n in (9, 5, 4, 12)))


def test_what_is_cut_of_a_task_s_inputs_is_told_and_kept(llama):
    told = r"long: 3 of 4 inputs cut to 4 tokens\."
    with pytest.warns(UserWarning, match=told):
        result = evaluate(llama, LONG, formatting=Formatting(max_input_tokens=4))
    cuts = {"inputs": 4, "inputs_cut": 3}
    assert result.to_dict()["tasks"][0]["cuts"] == cuts


def test_experts_trained_on_inputs_of_another_form_are_told(llama, make_expert):
    expert = make_expert(llama, "short")
    info = replace(expert.info, hyperparameters={"max_input_tokens": 112})
    model = compose(Pool((replace(expert, info=info),)), llama, k=1, router="phatgoose")
    told = "max_input_tokens 512, but short was trained with max_input_tokens 112"
    with pytest.warns(UserWarning, match=told):
        evaluate(model, LONG, tokenizer=llama.tokenizer)
    evaluate(model, LONG, tokenizer=llama.tokenizer, formatting=Formatting(max_input_tokens=112))


# Answers: log-likelihoods of choices, or generated text


def test_ties_are_counted_and_the_first_choice_is_taken(llama):
    llama.model.lm_head.weight.data.zero_()  # all tokens equally likely
    examples = (
        Example("x", "cd", ("ab", "cd")),
        Example("y", "ef", ("ef", "gh")),
        Example("longer", "ef", ("ij", "ef", "gh")),
    )
    score = evaluate(llama, Task("ties", test=examples)).scores[0]
    assert [prediction.answer for prediction in score.predictions] == ["ab", "ef", "ij"]
    assert (score.ties, score.n) == (3, 3)
    assert score.score == pytest.approx(1 / 3)


@pytest.mark.parametrize("budget", [1, 4096])
def test_open_tasks_are_scored_by_generation_and_exact_match(base, budget):
    """A task's own bound of its answers comes before that of the evaluation."""
    texts = ("a", "some longer text", "b c d")
    for own, tokens in ((None, 5), (2, 2)):
        right = [Example(text, greedy_text(base.model, base, text, tokens)) for text in texts]
        examples = (*right, Example("something else", "never this"))
        task = Task("open", test=examples, max_new_tokens=own)
        (score,) = evaluate(base, task, max_new_tokens=5, token_budget=budget).scores
        assert [p.answer for p in score.predictions[:3]] == [e.target for e in right]
        assert (score.metric, score.score, score.ties) == ("exact match", 0.75, 0)


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


def test_a_model_that_cannot_be_packed_is_scored_alike(llama, monkeypatch):
    wanted = evaluate(llama, CHOICE_TASK).scores[0].predictions
    monkeypatch.setattr(llama.model.config, "sliding_window", 10**6, raising=False)
    assert not can_pack(llama.model)
    got = evaluate(llama, CHOICE_TASK).scores[0].predictions
    for one, other in zip(got, wanted, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_a_routed_model_is_scored_as_the_naively_routed_one(base, pool):
    with naively_routed(base.model, pool.experts, k=2):
        wanted = [naive_scores(base.model, base, example) for example in CHOICE_TASK.test]
    score = evaluate(compose(pool, base, router="phatgoose"), CHOICE_TASK).scores[0]
    for prediction, scores in zip(score.predictions, wanted, strict=True):
        assert prediction.scores == pytest.approx(scores, abs=1e-4)
