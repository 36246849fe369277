"""Router phatgoose-input: one expert for a whole input, against its formula by brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixed_by_hand import adding
from phatgoose.config import Formatting, Routing
from phatgoose.errors import PoolError, RoutingError
from phatgoose.evaluation.comparison.methods import lacking, rows_of
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.growing import remove_experts
from phatgoose.routing.recording import record, watch
from phatgoose.routing.routers.phatgoose_input import LEAST
from phatgoose.routing.routers.vector_router import standardise
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.tasks.task import Example, Task
from tiny import assert_same_logits, logits_of
from topic_prompts import experts_of, scores_of

PROMPTS = ("plums or apples", "5 + 6 = 11, 1 + 9", "WHO? WHAT? WHERE?", "zigzag jazz;", "apples")
CHOOSING = Task(
    "choosing",
    test=tuple(Example(prompt, "yes", ("yes", "no, never", "plums")) for prompt in PROMPTS),
)

both_streams = pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)


def vote(base, pool: Pool, text: str) -> list[float]:
    """The mean affinity of each expert, site by site and token by token."""
    seen: dict[str, torch.Tensor] = {}

    def keep(site: str):
        return lambda _, args: seen.__setitem__(site, args[0][0].double())

    model = base.model
    handles = [model.get_submodule(s).register_forward_pre_hook(keep(s)) for s in pool.sites]
    stack = model.get_encoder() if base.is_encoder_decoder else model.base_model
    with torch.no_grad():
        stack(input_ids=torch.tensor([base.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    means = []
    for expert in pool.experts:
        sites = []
        for site, u in seen.items():
            if site not in expert.modules:
                continue
            (gate,) = standardise(expert.gates[site][None].float()).double()
            usual = torch.stack([e.means[site] for e in pool.experts if site in e.modules])
            away = u - usual.double().mean(0)
            scale = (u.var(-1, correction=0) + 1e-5).sqrt() * u.shape[-1] ** 0.5
            sites.append(float((away @ gate / scale).mean()))
        means.append(sum(sites) / len(sites))
    return means


def assert_as_alone(base, pool: Pool, owners, routed, formatting=None) -> None:
    """The scores of `routed` on CHOOSING are those of each example's owner alone."""
    for place, owner in enumerate(owners):
        model = compose(pool, base, router="single", expert=pool.names[owner])
        (alone,) = evaluate(model, CHOOSING, tokenizer=base.tokenizer, formatting=formatting).scores
        detach(model)
        torch.testing.assert_close(
            torch.tensor(routed.predictions[place].scores),
            torch.tensor(alone.predictions[place].scores),
            atol=1e-4,
            rtol=1e-4,
        )


@both_streams
def test_the_vote_is_the_mean_over_tokens_and_sites(base, pool):
    expected = [vote(base, pool, text) for text in PROMPTS]
    model = compose(pool, base, router="phatgoose-input")
    found = scores_of(composition_of(model).lookup, PROMPTS)
    detach(model)
    torch.testing.assert_close(
        found.double(), torch.tensor(expected).double(), atol=1e-3, rtol=1e-3
    )
    assert len(set(found.argmax(-1).tolist())) > 1  # or nothing is tested below


@both_streams
def test_inputs_are_read_as_the_evaluation_reads_them(base, pool):
    cut = Formatting(max_input_tokens=3, truncation="right")
    model = compose(pool, base, router="phatgoose-input")
    lookup = composition_of(model).lookup
    tokens = [base.tokenizer(p, truncation=True, max_length=3)["input_ids"] for p in PROMPTS]
    expected = lookup.find(tokens).experts
    assert not torch.allclose(lookup.scores(tokens), scores_of(lookup, PROMPTS))
    with pytest.warns(UserWarning, match="cut to 3 tokens"):
        (score,) = evaluate(model, CHOOSING, tokenizer=base.tokenizer, formatting=cut).scores
    detach(model)
    with pytest.warns(UserWarning, match="cut to 3 tokens"):
        assert_as_alone(base, pool, expected.flatten().tolist(), score, cut)


@both_streams
def test_each_input_gets_what_its_expert_alone_would_give(base, pool):
    model = compose(pool, base, router="phatgoose-input")
    owners = experts_of(composition_of(model).lookup, PROMPTS).experts.flatten().tolist()
    (routed,) = evaluate(model, CHOOSING, tokenizer=base.tokenizer).scores
    detach(model)
    assert_as_alone(base, pool, owners, routed)


@both_streams
def test_prompts_that_nobody_announced_are_read_as_they_pass(base, pool):
    for text in PROMPTS[:3]:
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        model = compose(pool, base, router="phatgoose-input")
        (owner,) = experts_of(composition_of(model).lookup, [text]).experts.flatten().tolist()
        with record(model) as recording:
            routed = logits_of(model, ids)
        assert recording.experts == pool.names
        detach(model)
        model = compose(pool, base, router="single", expert=pool.names[owner])
        alone = logits_of(model, ids)
        detach(model)
        assert_same_logits(routed, alone)


@both_streams
def test_several_experts_are_mixed_by_the_softmax_of_their_votes(base, pool):
    votes = [vote(base, pool, text) for text in PROMPTS]
    rows = [torch.tensor([base.tokenizer(text)["input_ids"]]) for text in PROMPTS]
    options = {"input_k": 2, "input_temperature": 0.1}
    model = compose(pool, base, router="phatgoose-input", **options)
    got = [logits_of(model, ids) for ids in rows]
    detach(model)
    for ids, affinities, logits in zip(rows, votes, got, strict=True):
        best = sorted(range(4), key=lambda z: -affinities[z])[:2]
        weights = (torch.tensor([affinities[z] for z in best]) / 0.1).softmax(0).tolist()
        with adding(base, pool, {pool.names[z]: w for z, w in zip(best, weights, strict=True)}):
            wanted = logits_of(base.model, ids)
        torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=1e-3)


def test_padding_of_the_batch_is_masked_again_after_the_vote(llama, llama_pool):
    model = compose(llama_pool, llama, router="phatgoose-input")
    ids = torch.tensor([llama.tokenizer(PROMPTS[0])["input_ids"]])
    pads = torch.zeros(1, 3, dtype=torch.long)
    padded = torch.cat([pads, ids], dim=1)
    mask = torch.cat([pads, torch.ones_like(ids)], dim=1)
    seen = []
    with watch(model, lambda passed: seen.append(passed.real)):
        logits_of(model, padded, attention_mask=mask)
    layers = composition_of(model).layers
    detach(model)
    assert len(seen) == len(layers)  # the vote's own passes are not watched
    assert all(torch.equal(real, mask.bool()) for real in seen)


def in_the_decoder(expert: Expert) -> Expert:
    """`expert` at those sites only that read the decoder's tokens."""

    def kept(parts):
        cross = ("EncDecAttention.k", "EncDecAttention.v")
        inside = (s for s in parts if s.startswith("decoder") and not s.endswith(cross))
        return {site: parts[site] for site in inside}

    parts = {name: kept(getattr(expert, name)) for name in ("modules", "gates", "means")}
    return replace(expert, **parts)


@pytest.mark.parametrize("router", ["phatgoose-input", "phatgoose-evidence"])
@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_experts_that_no_prompt_passes_come_last(base, pool, router):
    apart = Pool((in_the_decoder(pool.experts[0]), *pool.experts[1:]))
    lookup = composition_of(compose(apart, base, router=router, input_k=4)).lookup
    scores = scores_of(lookup, PROMPTS)
    assert (scores[:, 0] == LEAST).all()
    assert (scores[:, 1:].max(dim=1).values < 0).any()  # where a score of 0 would win
    found = experts_of(lookup, PROMPTS)
    assert (found.experts[:, -1] == 0).all()
    assert found.experts.sort().values.tolist() == [[0, 1, 2, 3]] * len(PROMPTS)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(len(PROMPTS)))
    logits = logits_of(base.model, torch.tensor([base.tokenizer(PROMPTS[0])["input_ids"]]))
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_where_no_expert_reads_prompts_all_are_equal(base, pool):
    apart = Pool(tuple(map(in_the_decoder, pool.experts)))
    lookup = composition_of(compose(apart, base, router="phatgoose-input")).lookup
    assert not scores_of(lookup, PROMPTS).any()


def test_it_is_saved_and_loaded_and_does_not_grow(llama, llama_pool, tmp_path):
    model = compose(llama_pool, llama, router="phatgoose-input")
    expected = scores_of(composition_of(model).lookup, PROMPTS)
    save(model, tmp_path / "routed")
    detach(model)
    again = load(tmp_path / "routed", llama)
    assert torch.equal(scores_of(composition_of(again).lookup, PROMPTS), expected)
    with pytest.raises(RoutingError, match="made for the experts that it has"):
        remove_experts(again, llama_pool.names[:1])
    detach(again)


def test_it_needs_gates_and_means_and_is_told_from_others(llama, llama_pool):
    first = llama_pool.experts[0]
    for part in ("gates", "means"):
        bare = Pool((replace(first, **{part: {}}), *llama_pool.experts[1:]))
        assert lacking(bare)["phatgoose-input"] == {first.name: (part,)}
        with pytest.raises(PoolError, match=repr(first.name)):
            compose(bare, llama, router="phatgoose-input")
    (row,) = rows_of(llama_pool, ["phatgoose-input"], Routing())
    moved = replace(first, means={s: m + 1 for s, m in first.means.items()})
    (other,) = rows_of(Pool((moved, *llama_pool.experts[1:])), ["phatgoose-input"], Routing())
    assert row.identity != other.identity
