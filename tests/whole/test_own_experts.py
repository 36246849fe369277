"""Bases with a mixture of experts of their own, whose layers see some of the tokens only."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from architectures import random_expert
from batched import GREEDY, alone, prompt_of
from other_encoders import make_other
from phatgoose.analysis.analyse import analyse
from phatgoose.analysis.traces import trace
from phatgoose.apps.generation import generate, recorded_tokens
from phatgoose.apps.report.page import write_report
from phatgoose.apps.server.engine.model_runner import ModelRunner
from phatgoose.base.fingerprint import fingerprint
from phatgoose.base.loading import Base
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.routing.composition import composition_of
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.task import Example, Task
from scored_tasks import CHOICE_TASK, naive_scores
from tiny import make_tokenizer


@pytest.fixture(params=["switch_transformers", "nllb-moe"])
def base(request):
    model = make_other(request.param)
    model.generation_config.eos_token_id = None
    return Base(model, make_tokenizer(final_eos=True), "tiny", None, fingerprint(model))


@pytest.fixture
def routed(base):
    pool = Pool(tuple(random_expert(base.model, seed) for seed in range(3)))
    return compose(pool, base)


@pytest.mark.parametrize("base", ["switch_transformers"], indirect=True)
def test_choices_are_scored(base, routed):
    """NLLB-MoE's experts take so many tokens of a batch, so what it says depends on the batch."""
    score = evaluate(routed, CHOICE_TASK, tokenizer=base.tokenizer).scores[0]
    for example, prediction in zip(CHOICE_TASK.test, score.predictions, strict=True):
        assert prediction.scores == pytest.approx(naive_scores(routed, base, example), abs=1e-4)


def test_the_server_answers_and_tells_who_did(base, routed):
    runner = ModelRunner(routed, base.tokenizer)
    runner.ends = frozenset()
    row = alone(runner, prompt_of(1), GREEDY)
    ids = torch.tensor([prompt_of(1)])
    options = {"max_new_tokens": GREEDY.max_tokens, "do_sample": False}
    wanted = routed.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert row.generated == wanted[0, 1:].tolist()


def test_sites_that_see_some_tokens_are_left_out_of_what_is_told_of_tokens(base, routed):
    encoder = Encoder(base.tokenizer, is_encoder_decoder=True)
    whole = Counter(layer.site.stream for layer in composition_of(routed).layers.values())
    for stream in trace(routed, encoder, encoder.pair("Is a heron a bird?" * 9, "a bird")).streams:
        assert len(stream.tokens) == len(stream.experts)
        if base.model.config.model_type == "switch_transformers":  # one expert for each token
            assert 0 < len(stream.sites) < whole[stream.name]
    result = generate(routed, base.tokenizer, "a goose", record=True)
    assert recorded_tokens(result, base.tokenizer).spans


def test_it_is_analysed(base, routed, tmp_path):
    tasks = [Task(name, test=(Example(f"{name} {name}", "b"),)) for name in ("one", "two")]
    found = analyse(routed, tasks, tokenizer=base.tokenizer)
    assert write_report(found, tmp_path).is_file()
