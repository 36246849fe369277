"""Experts that act from a prompt's end on, beside ordinary ones, in every kind of pass.

What is wanted is computed by the oracle: the base under hooks that add the paper's formula, one
text after the other, without padding or cache, of the experts that act at each token.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from architectures import make_tiny, random_expert
from oracle import naively_routed
from phatgoose.errors import RoutingError
from phatgoose.evaluation.likelihood import choice_log_likelihoods
from phatgoose.experts.expert import Expert, tail_of
from phatgoose.experts.pool import Pool
from phatgoose.passes import cache_argument
from phatgoose.routing.compose import compose, load, routing_for, save
from phatgoose.routing.context import base_alone
from phatgoose.routing.export import export
from phatgoose.routing.recording import record
from phatgoose.routing.saved import add_to_saved, read_saved
from phatgoose.tasks import batching
from tiny import logits_of

PROMPTS = ([5, 9, 7, 8, 6, 7, 8, 4, 3], [9, 8, 7, 5, 6], [7, 8, 5, 5, 9, 9, 6])
MIXED, TAILS, ALIKE = (None, 3, 6, 1), (3, 1), (2, 2, 2)  # the 2nd prompt is shorter than a tail
NEW = 4


def tailed(experts: Iterable[Expert], tails: Sequence[int | None]) -> Pool:
    """A pool of `experts` that act on these many of a prompt's last tokens, None for all."""
    records = ({"tail": tail} if tail else None for tail in tails)
    return Pool(
        tuple(
            replace(each, info=replace(each.info, acts_on=record))
            for each, record in zip(experts, records, strict=True)
        )
    )


def acting_pool(base: PreTrainedModel, tails: Sequence[int | None]) -> Pool:
    return tailed([random_expert(base, z) for z in range(len(tails))], tails)


class Case:
    """A base, a pool of experts that act on `tails`, and both together."""

    def __init__(self, architecture: str, tails: Sequence[int | None]):
        self.base, self.tails = make_tiny(architecture), tails
        self.pool = acting_pool(self.base, tails)
        self.routed = compose(self.pool, copy.deepcopy(self.base), router="phatgoose")

    def active(self, prompt: list[int], columns: int) -> Tensor:
        """Which experts act at each token of a text that begins with `prompt`, [1, columns, E]."""
        begin = [0 if tail is None else len(prompt) - tail for tail in self.tails]
        return (torch.arange(columns)[:, None] >= torch.tensor(begin))[None]

    @torch.no_grad()
    def wanted(self, prompt: list[int], text: list[int]) -> Tensor:
        """The oracle's logits after each token of `text`, which begins with `prompt`."""
        active = self.active(prompt, len(text))
        with naively_routed(self.base, self.pool.experts, k=2, active=active):
            return self.base(torch.tensor([text]), use_cache=False).logits[0]


@pytest.fixture(scope="module", params=[MIXED, TAILS, ALIKE], ids=["mixed", "tails", "alike"])
def case(request):
    return Case("llama", request.param)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    pad = batching.pad_left if side == "left" else batching.pad_right
    return {"input_ids": pad(rows, 0), "attention_mask": pad([[1] * len(row) for row in rows], 0)}


# Passes.


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_plain_pass_takes_its_tokens_as_the_prompt(case, side):
    batch = padded([*PROMPTS], side)
    with torch.no_grad():
        got = case.routed(**batch).logits
    for row, prompt in enumerate(PROMPTS):
        real = batch["attention_mask"][row].bool()
        assert_close(got[row][real], case.wanted(prompt, prompt))


def test_the_experts_of_each_pass_matter(case):
    prompt = PROMPTS[0]
    with torch.no_grad():
        base = case.base(torch.tensor([prompt])).logits[0]
    wanted = case.wanted(prompt, prompt)
    assert (wanted[-1] - base[-1]).abs().max() > 0.1 * base.abs().max()
    if None not in case.tails:
        end = max(case.tails)
        assert torch.equal(wanted[:-end], base[:-end])


@torch.no_grad()
def test_the_base_reads_alone_where_no_expert_acts_on_every_token(case):
    ids = torch.tensor([PROMPTS[0]])
    wanted, routed = case.base(ids).logits, case.routed(ids).logits
    if None in case.tails:
        with pytest.raises(RoutingError, match="experts act on every token"):
            base_alone(case.routed).__enter__()
        return
    with record(case.routed) as recording, base_alone(case.routed):
        assert torch.equal(case.routed(ids).logits, wanted)
    assert not recording.weights  # nobody watches either
    assert torch.equal(case.routed(ids).logits, routed)
    assert not torch.equal(routed, wanted)


KINDS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "prefilled in parts": {"prefill_chunk_size": 3},
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
    batch = padded([*PROMPTS])
    found = generated(case.routed, batch, **KINDS[kind])
    assert_is_teacher_forced(case, found, PROMPTS, batch["input_ids"].shape[1])


def test_beams(case):
    batch = padded([*PROMPTS])
    found = generated(case.routed, batch, num_beams=3, output_scores=True)
    columns = batch["input_ids"].shape[1]
    for row, prompt in enumerate(PROMPTS):
        answer = found.sequences[row, columns:].tolist()
        logits = case.wanted(prompt, prompt + answer[:-1])[len(prompt) - 1 :]
        chosen = logits.log_softmax(-1)[range(len(answer)), answer]
        assert float(found.sequences_scores[row]) == pytest.approx(float(chosen.mean()), rel=1e-4)


@pytest.mark.parametrize("drafts", ["assistant", "lookup", "early exit"])
def test_drafts_are_of_the_answer(case, drafts):
    prompt = PROMPTS[0]
    options = {
        "assistant": {"assistant_model": copy.deepcopy(case.base)},
        "lookup": {"prompt_lookup_num_tokens": 2},
        "early exit": {"assistant_early_exit": 1},
    }[drafts]
    found = generated(case.routed, {"input_ids": torch.tensor([prompt])}, **options)
    assert_is_teacher_forced(case, found, [prompt], len(prompt))


def test_embeddings_show_where_a_prompt_ends(case):
    batch = padded([*PROMPTS])
    batch["inputs_embeds"] = case.base.get_input_embeddings()(batch.pop("input_ids")).detach()
    assert_is_teacher_forced(case, generated(case.routed, batch), PROMPTS, 0)
    with torch.no_grad():
        assert_close(case.routed(**batch).logits[0], case.wanted(PROMPTS[0], PROMPTS[0]))


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "gemma2", "mistral", "opt"])
def test_other_architectures(architecture):
    case, batch = Case(architecture, MIXED), padded([*PROMPTS])
    for kind in ("greedy", "no cache", "static cache"):
        found = generated(case.routed, batch, **KINDS[kind])
        assert_is_teacher_forced(case, found, PROMPTS, batch["input_ids"].shape[1])


# The base's cache of a prompt's body is the routed model's.


def keys_and_values(cache) -> list[Tensor]:
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def test_the_cache_of_a_body_is_the_bases_bit_for_bit():
    case, prompt = Case("llama", TAILS), PROMPTS[0]
    body, ids = len(prompt) - 3, torch.tensor([prompt])
    with torch.no_grad():
        base, routed = (model(ids).past_key_values for model in (case.base, case.routed))
    for one, other in zip(keys_and_values(base), keys_and_values(routed), strict=True):
        assert torch.equal(one[:, :, :body], other[:, :, :body])
    assert not torch.equal(one, other)
    # So generate goes on from the base's cache of the body.
    shared = DynamicCache(config=case.base.config)
    with torch.no_grad():
        case.base(ids[:, :body], **{cache_argument(case.base): shared}, use_cache=True)
    found = generated(case.routed, {"input_ids": ids}, **{cache_argument(case.base): shared})
    assert_is_teacher_forced(case, found, [prompt], len(prompt))


def test_a_pass_goes_on_from_its_own_cache_and_no_other(case):
    prompt, answer = PROMPTS[0], [4, 5]
    with torch.no_grad():
        cache = case.routed(torch.tensor([prompt])).past_key_values
        held = {cache_argument(case.base): cache}
        got = case.routed(torch.tensor([answer]), **held).logits[0]
    assert_close(got, case.wanted(prompt, prompt + answer)[len(prompt) :])
    with torch.no_grad():
        held = {cache_argument(case.base): case.base(torch.tensor([prompt])).past_key_values}
    with pytest.raises(RoutingError, match="has not read the one in this cache"):
        case.routed(torch.tensor([answer]), **held)
    with routing_for(case.routed, []), torch.no_grad():  # of nothing: passes are read
        assert_close(case.routed(torch.tensor([prompt])).logits[0], case.wanted(prompt, prompt))
    text = [*prompt, *answer]
    with routing_for(case.routed, [prompt]), torch.no_grad():  # said by the caller
        found = case.routed(torch.tensor([text])).logits[0]
    assert_close(found, case.wanted(prompt, text))


@pytest.mark.parametrize("announced", [False, True])
def test_a_cache_of_the_bases_that_reaches_into_the_tail_is_refused(case, announced):
    prompt = PROMPTS[0]
    known = routing_for(case.routed, [prompt]) if announced else nullcontext()
    with torch.no_grad():
        cache = case.base(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
    held = {cache_argument(case.base): cache}
    with known, pytest.raises(RoutingError, match="without a cache, or a cache of fewer tokens"):
        generated(case.routed, {"input_ids": torch.tensor([prompt])}, **held)


def test_a_second_turn_goes_on_with_the_first_ones_experts(case):
    held = {cache_argument(case.base): DynamicCache(config=case.base.config)}
    ids = torch.tensor([PROMPTS[1]])
    first = generated(case.routed, {"input_ids": ids}, **held).sequences
    second = torch.cat([first, torch.tensor([PROMPTS[0]])], dim=1)
    found = generated(case.routed, {"input_ids": second}, **held)
    text = found.sequences[0].tolist()
    wanted = case.wanted(PROMPTS[1], text[:-1])[second.shape[1] - 1 :]
    assert_close(torch.cat(found.logits), wanted)
    found = generated(case.routed, {"input_ids": second})  # without it, anew
    assert_is_teacher_forced(case, found, second.tolist(), second.shape[1])


def test_gradient_checkpointing_is_refused(case):
    ids = torch.tensor([PROMPTS[0]])
    case.routed.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the name, which v6 changes
        case.routed.gradient_checkpointing_enable({"use_reentrant": False})
        loss = case.routed(ids, use_cache=False).logits.square().mean()
        case.routed.gradient_checkpointing_disable()
    with pytest.raises(RoutingError, match="gradient checkpointing"):
        loss.backward()
    case.routed.zero_grad()
    case.routed.eval()
    with torch.no_grad():  # a pass that broke off leaves nothing behind
        assert_close(case.routed(ids).logits[0], case.wanted(PROMPTS[0], PROMPTS[0]))


@pytest.mark.parametrize("packs", [True, False])
def test_choices_are_scored_packed_and_padded(case, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(batching, "can_pack", lambda _: False)
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


@pytest.mark.parametrize("router", ["phatgoose", "merged", "arrow"])
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
