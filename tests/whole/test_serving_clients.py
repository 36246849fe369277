"""The server as its clients see it: openai, lm_eval and schemathesis."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import serving
from phatgoose.base.loading import load_base
from phatgoose.config import Serving
from phatgoose.routing.compose import compose

PROMPT = "to be or not"


FUZZ = int(os.environ.get("PHATGOOSE_FUZZ", "15"))  # requests made up for each path and mode


@pytest.fixture(scope="module")
def pool(pool_of):
    return pool_of("llama")


@pytest.fixture(scope="module")
def app(pool):
    app = serving.app_of(pool, Serving(max_tokens=64), api_keys=["secret"])
    for served in app.state.service.models.values():
        served.runner.tokenizer.chat_template = serving.CHAT_TEMPLATE
    return app


@pytest.fixture(scope="module")
def address(app):
    with serving.running(app) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    openai = pytest.importorskip("openai", reason="needs the package openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_openai_completes_as_generate_does(client, pool):
    tokenizer = load_base(pool.base.id, dtype="float32").tokenizer
    tokens = serving.generated(pool, tokenizer(PROMPT)["input_ids"], 8)
    reply = client.completions.create(
        model="goose", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=2, echo=True
    )
    assert reply.choices[0].text == PROMPT + tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.total_tokens
    stream = client.completions.create(
        model="goose",
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"routing": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert PROMPT + text == reply.choices[0].text
    assert chunks[-1].usage == reply.usage
    assert chunks[0].choices[0].routing["tokens"]  # fields of ours come along


def test_openai_chats(client):
    wish = {"model": "mean", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7}
    whole = client.chat.completions.create(**wish, seed=1, n=2, logprobs=True, top_logprobs=1)
    assert len(whole.choices) == 2
    said = ["", ""]
    for chunk in client.chat.completions.create(**wish, seed=1, n=2, stream=True):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said == [choice.message.content for choice in whole.choices]
    said = whole.choices[0].message  # sent back as it is, and with every field
    for earlier in (said, said.model_dump()):
        more = [*wish["messages"], earlier, {"role": "user", "content": "more"}]
        client.chat.completions.create(**wish | {"messages": more})
    again = client.chat.completions.create(
        **wish, temperature=0, extra_body={"router": "phatgoose", "keep": ["e1"]}
    )
    assert again.choices[0].finish_reason in ("stop", "length")


def test_openai_raises_its_own_errors(client, address):
    import openai

    assert [model.id for model in client.models.list()] == ["goose", "mean"]
    assert client.models.retrieve("goose").id == "goose"
    with pytest.raises(openai.NotFoundError, match="no model 'duck'"):
        client.completions.create(model="duck", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens") as refused:
        client.completions.create(model="goose", prompt="x", max_tokens=1000)
    assert refused.value.param == "max_tokens"
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("output_type", "concurrent"),
    [("multiple_choice", 4), ("generate_until", 1), ("multiple_choice", 1)],
)
def test_lm_eval_s_local_completions_score_as_in_this_process(
    address, pool, tmp_path, monkeypatch, output_type, concurrent
):
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'harness'")
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    pytest.importorskip("aiohttp", reason="needs lm-eval[api]")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    tasks = write_task(tmp_path, output_type)

    def samples(model, **options):
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=["served_task"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
            **options,
        )["samples"]["served_task"]
        found = sorted(found, key=lambda sample: sample["doc_id"])
        return [[answer[0] for answer in sample["resps"]] for sample in found]

    base = load_base(pool.base.id, dtype="float32")
    own = HFLM(pretrained=compose(pool, base), tokenizer=base.tokenizer, softmax_dtype="float32")
    arguments = {
        "base_url": f"{address}/v1/completions",
        "model": "goose",
        "tokenizer": pool.base.id,
        "tokenizer_backend": "huggingface",
        "num_concurrent": concurrent,
        "batch_size": 2,
    }
    for got, wanted in zip(
        samples("local-completions", model_args=arguments), samples(own), strict=True
    ):
        if output_type == "generate_until":
            assert got == wanted
            continue
        for (score, is_greedy), (wanted_score, wanted_greedy) in zip(got, wanted, strict=True):
            assert float(score) == pytest.approx(float(wanted_score), abs=1e-4)
            assert str(is_greedy) == str(wanted_greedy)


TASK = """
task: served_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}, cache_dir: {folder}/cache}}
output_type: {output_type}
test_split: test
doc_to_text: "{{{{input}}}}"
doc_to_target: target
{more}
"""


CHOICES = """
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


OPEN = """
generation_kwargs: {until: ["zzz"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def write_task(folder: Path, output_type: str) -> Path:
    rows = [
        {"input": "is it?", "target": "yes", "choices": ["yes", "no"]},
        {"input": "which of the three", "target": "b", "choices": ["a", "b", "c"]},
        {
            "input": "a far longer input that needs padding",
            "target": "no",
            "choices": ["no", "ney"],
        },
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = CHOICES if output_type == "multiple_choice" else OPEN
    text = TASK.format(folder=folder, output_type=output_type, more=more)
    (folder / "served_task.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_nothing_that_the_schema_allows_or_forbids_breaks_the_server(
    address, mode, record_testsuite_property
):
    schemathesis = pytest.importorskip("schemathesis", reason="needs the package schemathesis")
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    rejected = schema.config.checks.negative_data_rejection
    rejected.expected_statuses = [*rejected.expected_statuses, "413"]
    right = [
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.response_headers_conformance,
        schemathesis.checks.not_a_server_error,
    ]
    if mode == "negative":
        right.append(checks.negative_data_rejection)
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        takes = bool(operation.body) or bool(operation.path_parameters)
        if not takes and (mode == "negative" or count > 4):
            continue

        @given(
            case=operation.as_strategy(generation_mode=GenerationMode(mode)),
            model=st.sampled_from(["goose", "mean", None]),
            few=st.booleans(),
        )
        @settings(
            max_examples=FUZZ if operation.body else 3,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def fuzz(case, model, few):
            nonlocal count
            count += 1
            if mode == "positive" and isinstance(case.body, dict):
                # Deeper than "there is no such model" or "too many answers".
                case.body["model"] = model or case.body["model"]
                if few:
                    case.body.update(n=1, max_tokens=3, keep=None, leave_out=None)
            case.call_and_validate(headers={"Authorization": "Bearer secret"}, checks=right)

        fuzz()
    record_testsuite_property(f"requests, {mode}", count)  # --junitxml tells
    assert count >= 30
