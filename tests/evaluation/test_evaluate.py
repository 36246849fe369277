"""Evaluation: examples drawn, scored and written down."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from oracle import naively_routed
from phatgoose.config import Formatting
from phatgoose.errors import EvaluationError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.metrics import Sample, metric
from phatgoose.routing.compose import compose, detach, load, save
from phatgoose.tasks.task import Example, Task
from scored_tasks import CHOICE_TASK, greedy_text, inputs_of, naive_scores, open_task


def test_a_limit_and_a_seed_draw_the_same_examples_for_every_model(llama):
    examples = tuple(Example(f"input number {i}", "a", ("a", "b")) for i in range(30))
    task = Task("many", test=examples)
    whole = inputs_of(task, evaluate(llama, task, token_budget=1))
    drawn = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        scores = inputs_of(task, evaluate(llama, task, limit=4, seed=seed, token_budget=1))
        drawn[name] = [whole.index(score) for score in scores]
    assert drawn["one"] == drawn["same"] == sorted(drawn["one"])
    assert len(set(drawn["one"])) == 4
    assert drawn["one"] != drawn["other"]
    expected = [examples.index(example) for example in task.evaluation_examples(4, seed=0)]
    assert drawn["one"] == expected


def test_scores_that_are_not_numbers_are_refused(llama):
    llama.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"'choose'.*not numbers"):
        evaluate(llama, CHOICE_TASK)


# Tasks that say how they are scored


def written_task(base, *metrics: str, tokens: int = 5) -> Task:
    """Two examples whose target is what the plain model writes, and two whose target isn't."""
    answers = [greedy_text(base.model, base, text, tokens) for text in ("a", "b c d")]
    return Task(
        "written",
        test=(
            Example("a", answers[0]),
            Example("b c d", "not so", references=("not so", answers[1])),
            Example("something else", "never this"),
            Example("a", f"{answers[0]} and more", choices=(answers[0], f"{answers[0]} and more")),
        ),
        metrics=metrics,
        max_new_tokens=tokens,
    )


def by_hand(name: str, answers, examples) -> float:
    """The score in one metric by the sums that its definition asks for."""
    rows = zip(answers, examples, strict=True)
    marks = np.array([metric(name).measure(answer, e.answers) for answer, e in rows])
    return float(metric(name).combine(marks.sum(axis=0), len(marks)))


@pytest.mark.parametrize(
    "metrics",
    [("rouge-l", "bleu"), ("squad-exact-match", "squad-f1"), ("normalised-exact-match",)],
    ids="+".join,
)
@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_a_task_is_scored_by_the_mean_of_its_metrics(base, metrics):
    task = written_task(base, *metrics)
    (score,) = evaluate(base, task).scores
    answers = [prediction.answer for prediction in score.predictions]
    assert answers[0] == task.test[0].target
    assert list(score.by_metric) == list(metrics)
    for name in metrics:
        assert score.by_metric[name] == pytest.approx(by_hand(name, answers, task.test), abs=1e-9)
    mean = sum(score.by_metric.values()) / len(metrics)
    assert score.score == pytest.approx(mean, abs=1e-12)
    assert score.metric == " + ".join(metric(name).label for name in metrics)
    for prediction, example in zip(score.predictions, task.test, strict=True):
        wanted = tuple(metric(name).measure(prediction.answer, example.answers) for name in metrics)
        assert prediction.marks == wanted
        assert prediction.scores == ()
        assert prediction.correct == (prediction.answer in example.answers)
    assert [prediction.correct for prediction in score.predictions] == [True, True, False, False]


CHOOSE, OPEN = CHOICE_TASK.test, (Example("open", "end"),)


@pytest.mark.parametrize(
    ("examples", "metrics", "match"),
    [
        (CHOOSE, ("rouge",), r"Metric 'rouge' is unknown; known are accuracy, exact-match"),
        (CHOOSE, ("accuracy", "bleu"), "'odd' is scored by accuracy and bleu, but accuracy ranks"),
        ((*CHOOSE, *OPEN), (), "'odd' is scored by accuracy, but accuracy ranks choices"),
    ],
)
def test_metrics_that_no_answer_can_serve_are_refused(llama, examples, metrics, match):
    with pytest.raises(EvaluationError, match=match):
        evaluate(llama, Task("odd", test=examples, metrics=metrics))


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
    words = ("left", "right", "up", "down")
    answer = greedy_text(llama.model, llama, "a", 5)
    examples = tuple(
        Example("a", answer if i % 3 else f"{answer} {word}") for i, word in enumerate(words)
    )
    examples = (*examples, *(Example("a", "qq ww ee") for _ in range(3)))
    task = Task("seven", test=examples, metrics=metrics, max_new_tokens=5)
    (score,) = evaluate(llama, task).scores
    sample = Sample.of(metrics, [prediction.marks for prediction in score.predictions])
    assert score.score == pytest.approx(sample.score)
    bootstrap = sample.estimate()
    if wilson:
        share = binomtest(round(score.score * 7), 7).proportion_ci(0.95, method="wilson")
        assert (score.low, score.high) == pytest.approx((share.low, share.high))
        assert (score.low, score.high) != pytest.approx((bootstrap.low, bootstrap.high))
    else:
        assert (score.low, score.high) == (bootstrap.low, bootstrap.high)
    assert 0 <= score.low <= score.score <= score.high <= 1


LONG = Task("long", test=tuple(Example("a" * n, "yes", ("yes", "no")) for n in (9, 5, 4, 12)))


def test_what_is_cut_of_a_task_s_inputs_is_told_and_kept(llama, tmp_path):
    told = r"long: 3 of 4 inputs \(75 %\) cut to 4 tokens, by 5 in the median\."
    with pytest.warns(UserWarning, match=told):
        result = evaluate(llama, LONG, formatting=Formatting(max_input_tokens=4))
    cuts = {"inputs": 4, "inputs_cut": 3, "inputs_cut_to": 4, "inputs_cut_by": 5}
    assert result.to_dict()["tasks"][0]["cuts"] == cuts


def test_experts_trained_on_inputs_of_another_form_are_told(llama, make_expert, tmp_path):
    expert = make_expert(llama, "short")
    info = replace(expert.info, hyperparameters={"max_input_tokens": 112})
    replace(expert, info=info).save(expert.directory, overwrite=True)
    model = compose(expert.directory, llama, k=1, router="phatgoose")
    save(model, tmp_path / "routed")
    again = load(tmp_path / "routed", detach(model))
    told = "max_input_tokens 512, but short was trained with max_input_tokens 112"
    with pytest.warns(UserWarning, match=told):
        evaluate(again, LONG, tokenizer=llama.tokenizer)
    evaluate(again, LONG, tokenizer=llama.tokenizer, formatting=Formatting(max_input_tokens=112))


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
    task = open_task(base, tokens=5)
    score = evaluate(base, task, max_new_tokens=5, token_budget=budget).scores[0]
    assert [p.answer for p in score.predictions[:3]] == [e.target for e in task.test[:3]]
    assert [p.correct for p in score.predictions] == [True, True, True, False]
    assert (score.metric, score.score, score.ties) == ("exact match", 0.75, 0)


@pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
def test_a_task_bounds_its_own_answers(base):
    examples = tuple(Example(text, "x") for text in ("a", "some longer text", "b c d"))
    tasks = [
        Task("own", test=examples, max_new_tokens=2),
        Task("the rest", test=examples),
        Task("long", test=examples, max_new_tokens=9),
    ]
    scores = evaluate(base, tasks, max_new_tokens=4).scores
    for score, tokens in zip(scores, (2, 4, 9), strict=True):
        answers = [prediction.answer for prediction in score.predictions]
        assert answers == [greedy_text(base.model, base, e.input, tokens) for e in examples]
    usual = evaluate(base, tasks[1]).scores[0].predictions[0].answer
    assert usual == greedy_text(base.model, base, "a", 64)


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
    monkeypatch.setattr("phatgoose.tasks.batching.can_pack", lambda _: False)
    got = evaluate(llama, CHOICE_TASK).scores[0].predictions
    for one, other in zip(got, wanted, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_a_prompt_without_tokens_is_refused(llama):
    with pytest.raises(EvaluationError, match="no tokens"):
        evaluate(llama, Task("empty", test=(Example("", "a", ("a", "b")),)))


def test_a_routed_model_is_scored_as_the_naively_routed_one(base, pool):
    with naively_routed(base.model, pool.experts, k=2):
        wanted = [naive_scores(base.model, base, example) for example in CHOICE_TASK.test]
    score = evaluate(compose(pool, base, router="phatgoose"), CHOICE_TASK).scores[0]
    for prediction, scores in zip(score.predictions, wanted, strict=True):
        assert prediction.scores == pytest.approx(scores, abs=1e-4)
