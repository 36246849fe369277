"""Experts that act from a prompt's end on, beside ordinary ones, in every kind of pass.

What is wanted is computed by the oracle: the base under hooks that add the paper's formula, one
text after the other, without padding or cache, of the experts that act at each token.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from architectures import make_tiny, random_expert
from oracle import naively_routed
from phatgoose.errors import RoutingError
from phatgoose.evaluation.likelihood import choice_log_likelihoods
from phatgoose.experts.expert import tail_of
from phatgoose.experts.pool import Pool
from phatgoose.passes import cache_argument
from phatgoose.routing.compose import compose, load, routing_for, save
from phatgoose.routing.context import base_alone
from phatgoose.routing.export import export
from phatgoose.routing.saved import add_to_saved, read_saved
from phatgoose.tasks import batching
from routed_models import tailed
from tiny import logits_of

PROMPTS = ([5, 9, 7, 8, 6, 7, 8, 4, 3], [9, 8, 7, 5, 6], [7, 8, 5, 5, 9, 9, 6])
MIXED, TAILS, ALIKE = (None, 3, 6, 1), (3, 1), (2, 2, 2)  # the 2nd prompt is shorter than a tail
NEW = 4
CACHE = cache_argument(make_tiny("llama"))


def acting_pool(base: PreTrainedModel, tails: Sequence[int | None]) -> Pool:
    return tailed([random_expert(base, z) for z in range(len(tails))], tails)


class Case:
    """A base, a pool of experts that act on `tails`, and both together."""

    def __init__(self, architecture: str, tails: Sequence[int | None]):
        self.base, self.tails = make_tiny(architecture), tails
        self.pool = acting_pool(self.base, tails)
        self.routed = compose(self.pool, copy.deepcopy(self.base), router="phatgoose")

    def wanted(self, prompt: list[int], text: list[int], **inputs: Tensor) -> Tensor:
        """The oracle's logits after each token of `text`, which begins with `prompt`."""
        begin = [0 if tail is None else len(prompt) - tail for tail in self.tails]
        active = (torch.arange(len(text))[:, None] >= torch.tensor(begin))[None]
        inputs = inputs or {"input_ids": torch.tensor([text])}
        with naively_routed(self.base, self.pool.experts, k=2, active=active):
            return self.base(**inputs, use_cache=False).logits[0]


@pytest.fixture(scope="module", params=[MIXED, TAILS, ALIKE], ids=["mixed", "tails", "alike"])
def case(request):
    return Case("llama", request.param)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    most = float(wanted.detach().abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * most)


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    pad = batching.pad_left if side == "left" else batching.pad_right
    return {"input_ids": pad(rows, 0), "attention_mask": pad([[1] * len(row) for row in rows], 0)}


# Passes.


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_plain_pass_takes_its_tokens_as_the_prompt(case, side):
    batch = padded([*PROMPTS], side)
    got = case.routed(**batch).logits
    for row, prompt in enumerate(PROMPTS):
        real = batch["attention_mask"][row].bool()
        assert_close(got[row][real], case.wanted(prompt, prompt))


def test_gradients_are_the_oracles(case):
    """Of the inputs, through the tokens where experts act and those where none does."""
    prompt, grads = PROMPTS[0], []
    for forward in (case.routed, lambda **inputs: case.wanted(prompt, prompt, **inputs)):
        embeds = case.base.get_input_embeddings()(torch.tensor([prompt])).detach()
        found = forward(inputs_embeds=embeds.requires_grad_())
        (found if isinstance(found, Tensor) else found.logits).square().mean().backward()
        grads.append(embeds.grad)
    assert_close(*grads)


@torch.no_grad()
def test_the_base_reads_alone_where_no_expert_acts_on_every_token(case):
    ids = torch.tensor([PROMPTS[0]])
    wanted, routed = case.base(ids).logits, case.routed(ids).logits
    assert (routed[0, -1] - wanted[0, -1]).abs().max() > 0.1 * wanted.abs().max()
    if None in case.tails:
        with pytest.raises(RoutingError, match="experts act on every token"):
            base_alone(case.routed).__enter__()
        return
    with base_alone(case.routed):
        assert torch.equal(case.routed(ids).logits, wanted)
    assert torch.equal(case.routed(ids).logits, routed)


KINDS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "prefilled in parts": {"prefill_chunk_size": 3},
    "drafts of an assistant": {"assistant_model": make_tiny("llama")},
    "drafts looked up": {"prompt_lookup_num_tokens": 2},
    "drafts of first layers": {"assistant_early_exit": 1},
}


@torch.no_grad()
def generated(model, batch, **options):
    torch.manual_seed(0)
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, **(settings | options))


def assert_is_teacher_forced(case, found, prompts, answers_begin: int) -> None:
    """Each step's logits are the oracle's for what was generated by then."""
    times = len(found.sequences) // len(prompts)
    for row, tokens in enumerate(found.sequences.tolist()):
        prompt = prompts[row // times]
        answer = tokens[answers_begin:]
        wanted = case.wanted(prompt, prompt + answer[:-1])[len(prompt) - 1 :]
        assert_close(torch.stack([step[row] for step in found.logits]), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_oracles(case, kind):
    prompts = PROMPTS[:1] if "drafts" in kind else PROMPTS  # which are for one row
    batch = padded([*prompts])
    found = generated(case.routed, batch, **KINDS[kind])
    assert_is_teacher_forced(case, found, prompts, batch["input_ids"].shape[1])


@torch.no_grad()
def test_beams(case):
    batch = padded([*PROMPTS])
    found = generated(case.routed, batch, num_beams=3, output_scores=True)
    columns = batch["input_ids"].shape[1]
    for row, prompt in enumerate(PROMPTS):
        answer = found.sequences[row, columns:].tolist()
        logits = case.wanted(prompt, prompt + answer[:-1])[len(prompt) - 1 :]
        chosen = logits.log_softmax(-1)[range(len(answer)), answer]
        assert float(found.sequences_scores[row]) == pytest.approx(float(chosen.mean()), rel=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "gemma2", "opt"])
def test_other_architectures(architecture):
    case, batch = Case(architecture, MIXED), padded([*PROMPTS])
    for kind in ("greedy", "no cache", "static cache"):
        found = generated(case.routed, batch, **KINDS[kind])
        assert_is_teacher_forced(case, found, PROMPTS, batch["input_ids"].shape[1])


# The base's cache of a prompt's body is the routed model's.


@torch.no_grad()
def test_generate_goes_on_from_the_bases_cache_of_the_body():
    case, prompt = Case("llama", TAILS), PROMPTS[0]
    ids, shared = torch.tensor([prompt]), DynamicCache(config=make_tiny("llama").config)
    case.base(ids[:, :-3], **{CACHE: shared}, use_cache=True)
    assert torch.equal(case.routed(ids).logits[:, :-3], case.base(ids).logits[:, :-3])
    found = generated(case.routed, {"input_ids": ids}, **{CACHE: shared})
    assert_is_teacher_forced(case, found, [prompt], len(prompt))


@torch.no_grad()
def test_a_pass_goes_on_from_its_own_cache_and_no_other(case):
    prompt, answer = PROMPTS[0], [4, 5]
    text, ids = [*prompt, *answer], torch.tensor([answer])
    wanted = case.wanted(prompt, text)
    cache = case.routed(torch.tensor([prompt])).past_key_values
    assert_close(case.routed(ids, **{CACHE: cache}).logits[0], wanted[len(prompt) :])
    cache = case.base(torch.tensor([prompt])).past_key_values
    with pytest.raises(RoutingError, match="has not read the one in this cache"):
        case.routed(ids, **{CACHE: cache})
    with routing_for(case.routed, []):  # of nothing: passes are read
        assert_close(case.routed(torch.tensor([prompt])).logits[0], case.wanted(prompt, prompt))
    with routing_for(case.routed, [prompt]):  # said by the caller
        assert_close(case.routed(torch.tensor([text])).logits[0], wanted)


@pytest.mark.parametrize("announced", [False, True])
def test_a_cache_of_the_bases_that_reaches_into_the_tail_is_refused(case, announced):
    prompt = PROMPTS[0]
    known = routing_for(case.routed, [prompt]) if announced else nullcontext()
    with torch.no_grad():
        cache = case.base(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
    batch = {"input_ids": torch.tensor([prompt]), CACHE: cache}
    with known, pytest.raises(RoutingError, match="without a cache, or a cache of fewer tokens"):
        generated(case.routed, batch)


def test_a_second_turn_goes_on_with_the_first_ones_experts(case):
    cache = DynamicCache(config=case.base.config)
    first = {"input_ids": torch.tensor([PROMPTS[1]]), CACHE: cache}
    text = torch.cat([generated(case.routed, first).sequences[0], torch.tensor(PROMPTS[0])])
    second = {"input_ids": text[None], CACHE: cache}
    found = generated(case.routed, second)
    whole = found.sequences[0].tolist()
    assert_close(torch.cat(found.logits), case.wanted(PROMPTS[1], whole[:-1])[len(text) - 1 :])


def test_gradient_checkpointing_is_refused():
    case, ids = Case("llama", MIXED), torch.tensor([PROMPTS[0]])
    case.routed.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the name, which v6 changes
        case.routed.gradient_checkpointing_enable({"use_reentrant": False})
        loss = case.routed(ids, use_cache=False).logits.square().mean()
        case.routed.gradient_checkpointing_disable()
    with pytest.raises(RoutingError, match="gradient checkpointing"):
        loss.backward()
    # A pass that broke off leaves nothing behind.
    assert_close(case.routed.eval()(ids).logits[0], case.wanted(PROMPTS[0], PROMPTS[0]))


@torch.no_grad()
def test_choices_are_scored(case):
    rows = [(prompt, [[4, 5, 1], [6, 1], [8, 4, 1]]) for prompt in PROMPTS]
    with routing_for(case.routed, PROMPTS) as before_pass:
        found = dict(choice_log_likelihoods(case.routed, rows, 0, 64, before_pass))
    for index, (prompt, choices) in enumerate(rows):
        for got, choice in zip(found[index], choices, strict=True):
            logits = case.wanted(prompt, prompt + choice[:-1])[len(prompt) - 1 :]
            wanted = logits.log_softmax(-1)[range(len(choice)), choice].mean()
            assert got == pytest.approx(float(wanted), rel=1e-4)


def test_encoder_decoders_are_refused():
    base = make_tiny("t5")
    pool = acting_pool(base, (None, 2))
    with pytest.raises(RoutingError, match="act from a prompt's end on, but in an"):
        compose(pool, base, router="phatgoose")


# Saving, and leaving for other programs.


@pytest.mark.parametrize("router", ["phatgoose", "merged"])
def test_a_saved_model_keeps_where_its_experts_act(llama, llama_pool, tmp_path, router):
    pool, ids = tailed(llama_pool.experts, MIXED), torch.tensor([PROMPTS[0]])
    wanted = logits_of(compose(pool, copy.deepcopy(llama), router=router), ids)
    plain = logits_of(compose(llama_pool, copy.deepcopy(llama), router=router), ids)
    assert (wanted - plain).abs().max() > 1e-3
    save(compose(pool, copy.deepcopy(llama), router=router), tmp_path / "saved")
    first = compose(pool.select(["e0", "e1"]), copy.deepcopy(llama), router=router)
    save(first, tmp_path / "grown")
    add_to_saved(tmp_path / "grown", pool.select(["e2", "e3"]))
    for folder in (tmp_path / "saved", tmp_path / "grown"):
        records = read_saved(folder).records
        assert tuple(map(tail_of, records)) == MIXED
        assert torch.equal(logits_of(load(folder, copy.deepcopy(llama)), ids), wanted)


def test_they_are_not_exported(llama, llama_pool, tmp_path):
    model = compose(tailed(llama_pool.experts, (2, None, None, None)), llama, router="merged")
    with pytest.raises(RoutingError, match=r"end on act e0.*, which no adapter"):
        export(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
