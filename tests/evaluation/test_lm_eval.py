"""lm_eval's own command and functions on tiny routed models, without a network."""

import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra 'harness'")

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from odd_files import rewrite
from phatgoose.errors import ConfigError
from phatgoose.evaluation import lm_eval as harness
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.evaluation.lm_eval import PhatgooseLM
from phatgoose.routing.compose import compose, save
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.task import Task
from scored_tasks import EXAMPLES, answers_of, greedy_text, results_of, write_task

KINDS_HERE = pytest.mark.parametrize("kind", ["llama", "t5"])


def run(pool_folder: Path, tasks: Path, **arguments: object) -> dict:
    """lm_eval's results of `--model phatgoose`."""
    arguments |= {"pool": str(pool_folder), "dtype": "float32"}
    return results_of("phatgoose", tasks, model_args=arguments)


def folder_of(pool) -> Path:
    return pool.experts[0].directory.parent


def scores_of(results: dict) -> list[list[float]]:
    """The log-likelihood of each choice of each example, in file order."""
    return [[float(score) for score, _ in answers] for answers in answers_of(results)]


@KINDS_HERE
def test_log_likelihoods_and_accuracy_are_those_of_evaluate(pool, base, tmp_path):
    results = run(folder_of(pool), write_task(tmp_path), add_eos=True, k=2, batch_size=3)
    model = compose(pool, base, k=2, router="phatgoose")
    encoder = Encoder(base.tokenizer, is_encoder_decoder=base.is_encoder_decoder)
    predictions = evaluate(model, Task("t", test=EXAMPLES)).scores[0].predictions
    for sums, example, ours in zip(scores_of(results), EXAMPLES, predictions, strict=True):
        lengths = [len(encoder.target(example.input, each).tokens) for each in example.choices]
        means = [total / length for total, length in zip(sums, lengths, strict=True)]
        assert means == pytest.approx(ours.scores, abs=1e-4)
        assert example.choices[means.index(max(means))] == ours.answer


@KINDS_HERE
def test_without_end_of_sequence_the_numbers_are_those_of_lm_eval_s_own_model(pool, base, tmp_path):
    tasks = write_task(tmp_path)
    model = compose(pool, base, k=2, router="phatgoose")
    own = HFLM(pretrained=model, tokenizer=base.tokenizer, batch_size=2, softmax_dtype="float32")
    if base.is_encoder_decoder:  # this tokenizer, unlike T5's, keeps the space before a choice
        rewrite(tasks / "my_task.yaml", target_delimiter="")
    wanted = results_of(own, tasks)
    got = run(folder_of(pool), tasks, k=2)
    assert got["results"]["my_task"]["acc,none"] == wanted["results"]["my_task"]["acc,none"]
    for mine, theirs in zip(scores_of(got), scores_of(wanted), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


@KINDS_HERE
def test_generated_answers_are_those_of_the_routed_model(pool, base, tmp_path):
    size = 1 if base.is_encoder_decoder else 3  # lm_eval's limit there counts the padded prompt
    results = run(folder_of(pool), write_task(tmp_path, "generate_until"), batch_size=size)
    model = compose(pool, base, router="phatgoose")
    for sample in results["samples"]["my_task"]:
        text = sample["doc"]["input"]
        tokens = len(base.tokenizer(text)["input_ids"]) + 5 if base.is_encoder_decoder else 6
        assert sample["resps"][0][0].strip() == greedy_text(model, base, text, tokens)


def test_arguments_that_cannot_be_used_are_refused(llama_pool, tmp_path):
    folder = str(folder_of(llama_pool))
    scores = {f"e{z}": {"my_task": z / 4} for z in range(4)}
    save(compose(llama_pool, router="oracle", scores=scores), tmp_path / "routed")
    for arguments, said in (
        ({"pool": folder, "routr": "phatgoose"}, "unknown setting 'routr'; known are"),
        ({"pool": folder, "router": "arrow:form=peft+frm=1"}, "unknown setting 'frm'"),
        ({"pool": "x", "max_input_tokens": 0}, "max_input_tokens is 0"),
        ({"pool": str(tmp_path / "routed")}, "router oracle or some experts need whole ones"),
    ):
        with pytest.raises(ConfigError, match=said):
            PhatgooseLM(**arguments)


@KINDS_HERE
def test_contexts_are_cut_by_our_rule(pool):
    for truncation in ("middle", "right"):
        how = {"max_input_tokens": 6, "truncation": truncation}
        opened = PhatgooseLM(pool=str(folder_of(pool)), dtype="float32", **how)
        end = "</s>" if opened.backend == "seq2seq" else ""
        middle = f"a{'ghij' if end else 'fghij'}{end}"
        wanted = middle if truncation == "middle" else f"abcde{end or 'f'}"
        with pytest.warns(UserWarning, match=f"truncation {truncation}"):
            rows, mask = opened.tok_batch_encode(["abcdefghij", "ab"])
        assert opened.tokenizer.decode(rows[0]) == wanted
        assert mask.sum(dim=1).tolist() == [6, 3 if end else 2]


def test_the_command_is_lm_eval_s_own(llama_pool, tmp_path, capsys, monkeypatch):
    """Its flags, its default device cuda:0 included, and its table."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes a second
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # would set up pytest's
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    before = list(sys.argv)
    harness.main(
        f"--model phatgoose --model_args pool={folder_of(llama_pool)},router=phatgoose,k=2 "
        f"--tasks my_task --include_path {write_task(tmp_path)}".split()
    )
    assert "|my_task|" in capsys.readouterr().out
    assert sys.argv == before
