"""The analysis as a whole: routers over a pool, Oracle, agreement, effects, findings, traces."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch

import phatgoose as pg
from phatgoose.analysis.agreement import DecisionFiles, agreement
from phatgoose.analysis.findings import findings_of, vector_similarity
from phatgoose.analysis.measures import kl_divergence
from phatgoose.analysis.places import place_of
from phatgoose.analysis.result import ORACLE
from phatgoose.analysis.routing_distribution import PARTS, RoutingProfile
from phatgoose.analysis.traces import _in_bytes, _pieces, trace
from phatgoose.base.sites import Site
from phatgoose.config import Routing
from phatgoose.errors import ConfigError, EvaluationError, RoutingError, TaskError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, record
from phatgoose.routing.recording import SitePass
from phatgoose.routing.saved.save import save
from phatgoose.tasks.encoding import Encoder
from routed_models import SCORES
from routing_samples import make_analysis
from tiny import make_adapter


def task(name, count=6):
    rows = [
        {"input": f"{name} {i} is", "target": ("good", "bad")[i % 2], "choices": ["good", "bad"]}
        for i in range(count)
    ]
    return pg.load_task(rows, name=name)


TASKS = [task("first"), task("second")]


@pytest.fixture
def found(llama, llama_pool):
    routers = ["phatgoose", "arrow", "oracle"]
    return pg.analyse(
        llama_pool, TASKS, routers=routers, base=llama, scores=SCORES, without_each=True
    )


def test_each_router_is_read_and_scored_as_if_it_were_alone(found, llama, llama_pool):
    for router in ("phatgoose", "arrow"):
        model = compose(llama_pool, llama, router=router)
        alone = pg.analyse(model, TASKS)
        assert list(alone.routers) == [router]
        for name, profile in alone.routers[router].profiles.items():
            np.testing.assert_array_equal(
                profile.whole(), found.routers[router].profiles[name].whole()
            )
        scores = pg.evaluate(model, TASKS).scores
        assert tuple(found.routers[router].scores.values()) == scores
        pg.detach(model)


def test_the_base_is_left_as_it_was(llama, llama_pool):
    pg.analyse(llama_pool, TASKS, base=llama, score=False)
    compose(llama_pool, llama)  # refused if it were still routed


def test_oracle_and_divergences(found):
    assert found.oracle == {"first": "e1", "second": "e2"}
    for dataset, expert in found.oracle.items():
        one = np.eye(4)[int(expert[1])]
        np.testing.assert_allclose(found.distribution(ORACLE, dataset), one, atol=1e-6)
        p = found.routers["phatgoose"].profiles[dataset].whole("probability")
        divergence = found.divergence("phatgoose", ORACLE, dataset)
        assert divergence.to == pytest.approx(kl_divergence(p, one))
        assert divergence.back == pytest.approx(kl_divergence(one, p))
    assert found.correlation("phatgoose").n == 2
    assert found.correlation("phatgoose").pearson is None


def test_oracle_needs_not_be_run_to_be_compared_with(llama, llama_pool):
    found = pg.analyse(llama_pool, TASKS, base=llama, scores=SCORES, score=False)
    np.testing.assert_array_equal(found.distribution(ORACLE, "first"), np.eye(4)[1])
    assert found.correlation("phatgoose") is None
    plain = pg.analyse(llama_pool, TASKS, base=llama, score=False)
    assert not plain.oracle
    assert plain.correlation("phatgoose") is None


def test_agreement_is_that_of_recordings(found, llama, llama_pool):
    tops, weights = {}, {}
    for router in ("phatgoose", "arrow"):
        model = compose(llama_pool, llama, router=router)
        encoder = Encoder(llama.tokenizer, is_encoder_decoder=False)
        pairs = [encoder.pair(e.input, e.target) for t in TASKS for e in t.evaluation_examples()]
        with record(model) as recording, torch.no_grad():
            for pair in pairs:
                model(input_ids=torch.tensor([pair.prompt + pair.target[:-1]]))
        rows = [torch.cat([part[0] for part in passes]) for passes in recording.weights.values()]
        weights[router] = torch.cat(rows)
        tops[router] = weights[router].argmax(dim=1)
        pg.detach(model)
    common = found.agreements["phatgoose", "arrow"]
    same = (tops["phatgoose"] == tops["arrow"]).float().mean().item()
    shared = torch.minimum(*weights.values()).sum(dim=1).mean().item()
    assert common.decisions == len(weights["arrow"])
    assert common.first == pytest.approx(same, abs=0.01)
    assert common.overlap == pytest.approx(shared, abs=0.01)


def test_routers_without_a_choice_in_common_have_no_agreement(tmp_path):
    site = Site("a", 2, 2, "decoder")
    for name, weights in (("one", torch.tensor([[0.0]])), ("other", torch.tensor([[1.0]]))):
        files = DecisionFiles(tmp_path / name, torch.tensor([1]))
        files.begin_pass({})
        experts = torch.tensor([[0]])
        files.add(SitePass(site, experts, weights, None, (1, 1), lambda w=weights: w))
        files.end_pass()
    assert agreement(tmp_path / "one", tmp_path / "other", 2) is None
    same = agreement(tmp_path / "other", tmp_path / "other", 2)
    assert (same.first, same.overlap, same.decisions) == (1, 1, 1)


def test_effects_are_differences_of_scores(found, llama, llama_pool):
    assert {effect.expert for effect in found.effects} == set(llama_pool.names)
    means = [effect.mean for effect in found.effects]
    assert means == sorted(means, reverse=True)
    effect = found.effects[0]
    less = compose(llama_pool, llama, leave_out=[effect.expert])
    reduced = pg.evaluate(less, TASKS)
    for score in reduced.scores:
        everyone = found.routers["phatgoose"].scores[score.task].score
        assert effect.by_task[score.task] == pytest.approx(everyone - score.score)
    assert effect.interval.low <= effect.mean <= effect.interval.high


def test_the_json_holds_the_numbers_and_no_text_of_the_data(found, tmp_path):
    found.write_json(tmp_path / "analysis.json")
    content = (tmp_path / "analysis.json").read_text()
    data = json.loads(content)
    assert data["experts"] == ["e0", "e1", "e2", "e3"]
    assert len(data["divergences"]) == 3 * 2 * 2  # each router to each other one, on two datasets
    profile = found.routers["arrow"].profiles["first"]
    assert data["routers"]["arrow"]["datasets"]["first"]["weight"] == profile.whole().tolist()
    assert data["leave_one_out"][0]["expert"] == found.effects[0].expert
    assert "first 0 is" not in content
    assert "NaN" not in content


def test_a_pool_by_its_path_and_a_routed_folder(llama, llama_pool, tmp_path):
    model = compose(llama_pool, llama, k=1)
    save(model, tmp_path / "routed")
    pg.detach(model)
    folder = llama_pool.experts[0].directory.parent
    from_pool = pg.analyse(folder, TASKS, routing=Routing(k=1), score=False)
    from_routed = pg.analyse(tmp_path / "routed", TASKS, score=False)
    assert from_pool.settings["routing"] == from_routed.settings["routing"]
    for name in ("first", "second"):
        one, other = (a.routers["phatgoose"].profiles[name] for a in (from_pool, from_routed))
        np.testing.assert_allclose(one.whole(), other.whole(), atol=5e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": []}, TaskError, "No task"),
        ({"tasks": [TASKS[0], TASKS[0]]}, TaskError, "Two tasks are called 'first'"),
        ({"smoothing": 0}, EvaluationError, "smoothing"),
        ({"without_each": True, "score": False}, ConfigError, "needs a pool, and scores"),
        ({"tasks": [task("third")], "scores": SCORES}, ConfigError, "don't have task 'third'"),
        ({"routers": ["nothing"]}, ConfigError, "router is 'nothing'"),
    ],
)
def test_what_cannot_be_analysed_is_refused(llama, llama_pool, options, error, message):
    options = {"tasks": TASKS, "base": llama} | options
    with pytest.raises(error, match=message):
        pg.analyse(llama_pool, options.pop("tasks"), **options)


def test_what_only_a_pool_can_do(llama, llama_pool):
    model = compose(llama_pool, llama)
    with pytest.raises(ConfigError, match="Several routers need a pool"):
        pg.analyse(model, TASKS, routers=["arrow"])
    with pytest.raises(ConfigError, match="needs a pool"):
        pg.analyse(model, TASKS, without_each=True)
    with pytest.raises(RoutingError, match="not routed"):
        pg.analyse(pg.detach(model), TASKS)


def test_an_oracle_without_scores_of_a_task_leaves_the_base_unrouted(llama, llama_pool):
    with suppress(RoutingError, ConfigError):
        pg.analyse(llama_pool, [task("third")], routers=["oracle"], base=llama, scores=SCORES)
    compose(llama_pool, llama)


# --- findings -------------------------------------------------------------------------------------


def profile_with(first, probability=None, tokens=1000):
    """A profile of one site with these shares of first choices and of probability."""
    names = tuple(f"e{z}" for z in range(len(first)))
    probability = first if probability is None else probability
    rows = {
        measure: {"model.layers.0.q": np.array([tokens * np.array(share, float), [0] * len(first)])}
        for measure, share in (
            ("probability", probability),
            ("weight", first),
            ("chosen", first),
            ("first", first),
        )
    }
    present = np.array(probability)[np.array(probability) > 0]
    entropy = -(present * np.log(present)).sum()
    site = {"model.layers.0.q": np.array([tokens, 0.0])}
    return RoutingProfile(
        names, site, rows, {"model.layers.0.q": np.array([tokens * entropy, 0.0])}
    )


def kinds(profile, similarity=None):
    size = len(profile.experts)
    return [
        f.kind
        for f in findings_of({"a": profile}, np.eye(size) if similarity is None else similarity)
    ]


def test_a_sound_pool_has_no_findings():
    assert kinds(profile_with([0.5, 0.3, 0.2])) == []


def test_one_expert_taking_everything_is_found():
    found = findings_of({"a": profile_with([0.85, 0.1, 0.05])}, np.eye(3))
    assert [f.kind for f in found] == ["takes-everything"]
    assert found[0].experts == ("e0",)
    assert "85%" in found[0].message
    assert kinds(profile_with([0.75, 0.2, 0.05])) == []


def test_a_gate_that_never_wins_is_found():
    found = findings_of({"a": profile_with([0.6, 0.4, 0.0], [0.5, 0.4, 0.1])}, np.eye(3))
    assert [(f.kind, f.experts) for f in found] == [("never-wins", ("e2",))]
    assert "never chosen at all" in found[0].message


def test_a_gate_that_wins_on_one_of_several_datasets_is_sound():
    profiles = {
        "a": profile_with([0.6, 0.4, 0.0], [0.5, 0.4, 0.1]),
        "b": profile_with([0.0, 0.4, 0.6], [0.1, 0.4, 0.5]),
    }
    assert findings_of(profiles, np.eye(3)) == []


def test_a_router_that_cannot_tell_experts_apart_is_found():
    assert kinds(profile_with([0.4, 0.3, 0.3], [0.34, 0.33, 0.33])) == ["undecided"]


def test_near_duplicates_are_found_once():
    similarity = np.array([[1, 0.97, 0], [0.97, 1, 0.3], [0, 0.3, 1]])
    found = findings_of({"a": profile_with([0.5, 0.3, 0.2])}, similarity)
    assert [(f.kind, f.experts) for f in found] == [("near-duplicates", ("e0", "e1"))]


def test_routers_that_compare_nothing_are_not_judged(llama, llama_pool):
    for router in ("merged", "random"):
        found = pg.analyse(llama_pool, TASKS, routers=[router], base=llama, score=False)
        assert found.routers[router].findings == ()


def test_an_expert_shared_twice_and_one_without_a_gate_are_found(llama, tmp_path, make_expert):
    first, sound = make_expert(llama, "first"), make_expert(llama, "sound", seed=1)
    adapter = make_adapter(llama, tmp_path / "copy", seed=0)
    gates = {site: 3 * gate + 0.01 for site, gate in first.gates.items()}  # not the same numbers
    copy = Expert.from_peft(adapter, gates, name="copy", base=llama).save(tmp_path / "copied")
    zeros = {site: torch.zeros_like(gate) for site, gate in first.gates.items()}
    flat = Expert.from_peft(adapter, zeros, name="flat", base=llama).save(tmp_path / "flat")
    with pytest.warns(UserWarning, match="never trained"):
        model = compose(Pool((first, copy, sound, flat)), llama, k=1)
    similarity = vector_similarity(model)
    assert similarity[0, 1] == pytest.approx(1, abs=1e-4)
    assert abs(similarity[0, 2]) < 0.5
    assert similarity[0, 3] == 0
    found = pg.analyse(model, TASKS, score=False).routers["phatgoose"].findings
    assert ("near-duplicates", ("first", "copy")) in [(f.kind, f.experts) for f in found]


def test_arrows_vectors_are_compared_up_to_their_sign(llama, llama_pool):
    model = compose(llama_pool, llama, router="arrow")
    similarity = vector_similarity(model)
    assert np.diag(similarity) == pytest.approx(1)
    assert (similarity >= 0).all()
    np.testing.assert_allclose(similarity, similarity.T)
    pg.detach(model)
    assert vector_similarity(compose(llama_pool, llama, router="merged")) is None


# --- traces ---------------------------------------------------------------------------------------


def traced(base, pool, prompt="Is a heron é a bird?", answer="a bird", **options):
    model = compose(pool, base, **options)
    encoder = Encoder(base.tokenizer, is_encoder_decoder=base.is_encoder_decoder)
    return model, encoder, trace(model, encoder, encoder.pair(prompt, answer))


def test_a_trace_has_the_weights_of_a_recording(base, pool):
    model, encoder, got = traced(base, pool)
    pair = encoder.pair("Is a heron é a bird?", "a bird")
    answer = pair.target[:-1]
    inputs = {"input_ids": torch.tensor([pair.prompt + answer])}
    if base.is_encoder_decoder:
        inputs = {"input_ids": torch.tensor([pair.prompt])}
        inputs["decoder_input_ids"] = torch.tensor([[0, *answer]])
    with record(model) as recording, torch.no_grad():
        model(**inputs)
    for stream in got.streams:
        sites = [site for site in recording.weights if recording.streams[site] == stream.name]
        assert [place_of(site) for site in sites] == list(stream.places)
        wanted = torch.stack([recording.weights[site][0][0] for site in sites]).mean(dim=0)
        np.testing.assert_allclose(stream.shares(4), wanted, atol=2 / 255)
        np.testing.assert_allclose(stream.shares(4).sum(axis=1), 1)


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_the_tokens_of_a_trace_are_the_text(base, pool):
    (stream,) = traced(base, pool)[2].streams
    assert "".join(stream.tokens).replace("\ufffd", "") == "Is a heron é a bird? a bird"
    answer = "".join(t for t, part in zip(stream.tokens, stream.parts, strict=True) if part)
    assert answer == " a bird"


def test_one_layer_and_kind_of_a_trace(llama, llama_pool):
    (stream,) = traced(llama, llama_pool, k=2)[2].streams
    one = stream.shares(4, "1", "q_proj")
    np.testing.assert_array_equal(one, stream.shares(4, "1", "self_attn.q_proj"))
    assert ((one > 0).sum(axis=1) == 2).all()
    layers = [stream.shares(4, layer) for layer in ("0", "1")]
    np.testing.assert_allclose(np.mean(layers, axis=0), stream.shares(4))
    with pytest.raises(RoutingError, match="layers are 0, 1, kinds self_attn"):
        stream.shares(4, "2")


def test_experts_beyond_the_kept_ones_are_summed(llama, make_expert):
    pool = Pool(tuple(make_expert(llama, f"e{z}", seed=z, rank=1) for z in range(10)))
    (stream,) = traced(llama, pool, router="merged")[2].streams
    assert stream.is_cut
    assert stream.experts.shape[2] == 8
    np.testing.assert_allclose(stream.shares(10).sum(axis=1), 0.8, atol=0.01)


def test_a_trace_in_json_can_be_read_back(llama, llama_pool):
    got = traced(llama, llama_pool)[2]
    data = json.loads(json.dumps(got.to_dict()))
    (stream,), (wanted,) = data["streams"], got.streams
    shape = (len(stream["tokens"]), len(stream["sites"]), stream["kept"])
    experts = np.frombuffer(base64.b64decode(stream["experts"]), "<u2").reshape(shape)
    weights = np.frombuffer(base64.b64decode(stream["weights"]), np.uint8).reshape(shape)
    np.testing.assert_array_equal(experts, wanted.experts)
    np.testing.assert_array_equal(weights, wanted.weights)
    assert (weights.sum(axis=2) == 255).all()
    layer, kind = stream["sites"][-1]
    assert (stream["layers"][layer], stream["kinds"][kind]) == ("1", "mlp.down_proj")
    assert data["parts"] == list(PARTS)


def test_weights_in_bytes_sum_to_the_whole():
    draw = np.random.default_rng(0)
    shares = draw.dirichlet(np.ones(5), size=1000)
    packed = _in_bytes(shares)
    assert (packed.sum(axis=1) == 255).all()
    assert np.abs(packed / 255 - shares).max() <= 1 / 255
    assert (_in_bytes(np.zeros((2, 3))) == 0).all()


def test_pieces_keep_characters_of_several_tokens_whole(llama):
    ids = llama.tokenizer("a é\n€")["input_ids"]
    pieces = _pieces(llama.tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces).replace("\ufffd", "") == "a é\n€"


def test_made_up_analyses_have_all_the_numbers_too():
    analysis = make_analysis(8)
    assert analysis.correlation("phatgoose").n == 4
    assert json.dumps(analysis.to_dict(), allow_nan=False)
    assert replace(analysis, oracle={}).correlation("phatgoose") is None
