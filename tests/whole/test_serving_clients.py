"""The server as its clients see it: openai, lm_eval and schemathesis; more are in tests/clients."""

import os

import pytest

import serving
from phatgoose.base.loading import load_base
from phatgoose.config import Serving
from phatgoose.routing.compose import compose
from serving import PROMPT

FUZZ = int(os.environ.get("PHATGOOSE_FUZZ", "15"))  # requests made up for each path and mode
MESSAGES = [{"role": "user", "content": "to be"}]


@pytest.fixture(scope="module")
def pool(pool_of):
    return pool_of("llama")


@pytest.fixture(scope="module")
def address(pool):
    options = {"template": serving.CHAT_TEMPLATE, "api_keys": ["secret"]}
    with serving.running(serving.app_of(pool, Serving(max_tokens=64), **options)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    openai = pytest.importorskip("openai", reason="needs the package openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_openai_completes(client):
    wish = {"model": "goose", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    reply = client.completions.create(**wish, logprobs=2)
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.completion_tokens
    options = {"stream_options": {"include_usage": True}, "extra_body": {"routing": True}}
    chunks = list(client.completions.create(**wish, stream=True, **options))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == reply.choices[0].text
    assert chunks[-1].usage == reply.usage
    assert chunks[0].choices[0].routing["tokens"]  # fields of ours come along


def test_openai_chats(client):
    def create(*more, **options):
        wish = {"model": "mean", "messages": [*MESSAGES, *more], "max_tokens": 7, "seed": 1}
        return client.chat.completions.create(**wish, n=2, **options)

    whole, said = create(logprobs=True, top_logprobs=1).choices, ["", ""]
    for chunk in create(stream=True):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said == [choice.message.content for choice in whole]
    message = whole[0].message  # sent back as it is, and with every field
    for earlier in (message, message.model_dump()):
        create(earlier, {"role": "user", "content": "more"})


def test_openai_raises_its_own_errors(client):
    import openai

    assert [model.id for model in client.models.list()] == ["goose", "mean"]
    with pytest.raises(openai.NotFoundError, match="no model 'duck'"):
        client.completions.create(model="duck", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens") as refused:
        client.completions.create(model="goose", prompt="x", max_tokens=0)
    assert refused.value.param == "max_tokens"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lm_eval_s_local_completions_answer_as_in_this_process(
    address, pool, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval", reason="needs the extra 'harness'")
    pytest.importorskip("tenacity", reason="needs lm-eval[api]")
    from lm_eval.models.huggingface import HFLM

    from scored_tasks import answers_of, results_of, write_task

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    tasks, base = write_task(tmp_path, "generate_until"), load_base(pool.base.id, dtype="float32")
    ours = compose(pool, base, router="phatgoose")
    arguments = {"base_url": f"{address}/v1/completions", "model": "goose", "batch_size": 2}
    arguments |= {"tokenizer": pool.base.id, "tokenizer_backend": "huggingface"}
    arguments |= {"tokenized_requests": False}
    model = HFLM(pretrained=ours, tokenizer=base.tokenizer, softmax_dtype="float32")
    served = results_of("local-completions", tasks, model_args=arguments)
    assert answers_of(served) == answers_of(results_of(model, tasks))


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
