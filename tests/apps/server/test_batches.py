"""Sequences that join, leave and share a batch get what they would get alone."""

from dataclasses import replace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from batched import GREEDY, TOKENIZER, alone, by_generate, finish, prompt_of, row_of
from phatgoose.apps.server.local.batches import Batch
from phatgoose.apps.server.local.runner import ModelRunner
from phatgoose.apps.server.requests import Decoding
from phatgoose.base import load_base
from phatgoose.experts.pool import Pool
from phatgoose.passes import ActsOn
from routed_models import compose_by
from tiny import VOCABULARY

pytestmark = pytest.mark.usefixtures("no_gradients")

OTHERS = ("average-activation", "arrow", "spectr", "merged", "single")
OTHERS += ("retrieval", "centroid", "discriminant", "discriminant:per_block=1")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_rows_may_join_and_leave_between_any_two_steps(runner_of, kind):
    runner, batch = runner_of(kind), Batch(runner_of(kind))
    lengths = [9, 2, 14, 5, 7, 1]
    rows = [
        row_of(runner, prompt_of(i), replace(GREEDY, max_tokens=n)) for i, n in enumerate(lengths)
    ]
    batch.join(rows[:2])
    batch.step()
    batch.step()  # the second leaves
    batch.join(rows[2:3])  # longer than what is there
    batch.step()
    batch.join(rows[3:])
    batch.step()
    assert [row.finish for row in rows] == [None, "length", None, None, None, "length"]
    finish(batch)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        assert row.generated == by_generate(runner, prompt_of(i), n)


def test_sliding_windows_slide_in_batches_too():
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    ids = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}
    config = MistralConfig(vocab_size=VOCABULARY, **small, **heads, **ids)
    runner = ModelRunner(MistralForCausalLM(config).eval(), TOKENIZER)
    runner.ends = frozenset()
    batch = Batch(runner)
    rows = [row_of(runner, prompt_of(seed, 20 - 7 * seed)) for seed in range(3)]
    batch.join(rows[:1])
    batch.step()
    batch.join(rows[1:])
    finish(batch)
    for seed, row in enumerate(rows):
        assert row.generated == by_generate(runner, prompt_of(seed, 20 - 7 * seed), 12)


@pytest.mark.parametrize("router", OTHERS)
def test_other_routers_batch_as_well(runner_of, router, toy_embedder):
    runner = runner_of("llama", router)
    batch = Batch(runner)
    turns = runner.routings_of([prompt_of(seed) for seed in range(4)])
    rows = [row_of(runner, prompt_of(seed), turn=turns[seed]) for seed in range(4)]
    batch.join(rows[:2])
    batch.step()
    batch.join(rows[2:])
    finish(batch)
    for seed, row in enumerate(rows):
        runner.model.phatgoose.context and runner.model.phatgoose.context.use(None)
        assert row.generated == by_generate(runner, prompt_of(seed), 12)


def test_sampling_depends_on_the_seed_and_not_on_the_company(runner_of):
    runner = runner_of()
    wishes = [Decoding(10, 0.9, 0.95, seed) for seed in range(4)]
    single = [alone(runner, prompt_of(2), wish).generated for wish in wishes]
    assert len({tuple(tokens) for tokens in single}) == 4
    assert alone(runner, prompt_of(2), wishes[0]).generated == single[0]
    batch = Batch(runner)
    rows = [row_of(runner, prompt_of(2), wish) for wish in wishes]
    batch.join([row_of(runner, prompt_of(7)), *rows])
    finish(batch)
    assert [row.generated for row in rows] == single


@pytest.mark.parametrize("router", ["phatgoose", "centroid"])
def test_experts_that_act_from_a_prompts_end_on(pool_of, router, toy_embedder):
    """Rows join and leave, as in a model that generates."""
    pool, ends = pool_of("llama"), (ActsOn(tail=3), None, ActsOn(invocation=(7, 8)), ActsOn(tail=1))
    pool = Pool(
        tuple(
            replace(each, info=replace(each.info, acts_on=end and end.record()))
            for each, end in zip(pool.experts, ends, strict=True)
        )
    )
    base = load_base(pool.base.id, dtype="float32")
    runner = ModelRunner(compose_by(router, pool, base), base.tokenizer)
    runner.ends = frozenset()
    prompts = [prompt_of(0), [*prompt_of(1), 7, 8, 9], prompt_of(2), [7, 8, *prompt_of(1)]]
    wanted = [by_generate(runner, prompt, 12) for prompt in prompts]  # before it is announced to
    rows = [
        row_of(runner, prompt, replace(GREEDY, max_tokens=n), 0, "", turn)
        for prompt, n, turn in zip(prompts, (9, 2, 6, 4), runner.routings_of(prompts), strict=True)
    ]
    batch = Batch(runner)
    batch.join(rows[:2])
    batch.step()
    batch.step()
    batch.join(rows[2:])
    finish(batch)
    for row, answer in zip(rows, wanted, strict=True):
        assert row.generated == answer[: row.decoding.max_tokens]
