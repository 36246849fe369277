"""Router centroid beside cosines and mixtures by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixed_by_hand import adding
from phatgoose.config import Routing
from phatgoose.errors import ConfigError, PoolError, RoutingError
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.files.strict import sha256_of
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.growing import add_experts, remove_experts
from phatgoose.routing.routers.centroid import centroids_of
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from phatgoose.routing.saved.segments import add_to_saved, compact, remove_from_saved, save_pool
from phatgoose.tasks.batching import pad_left, pad_right
from routed_models import compose_by, with_embeddings
from tiny import assert_same_logits, logits_of, make_ids
from topic_prompts import CHOOSING, PROMPTS, both_streams, experts_of, passed, retrieving
from toy_embedders import toy_embed


def shares(pool: Pool, text: str, k: int = 3, temperature: float = 0.2) -> dict[str, float]:
    """The experts of a prompt and their weights, one cosine at a time."""
    (query,) = toy_embed([text]).double()
    cosines = {}
    for expert in with_embeddings(pool).experts:
        mean = expert.embeddings.double().mean(dim=0)
        cosines[expert.name] = float(query @ mean / mean.norm())
    chosen = sorted(cosines, key=lambda name: -cosines[name])[:k]
    powers = {name: math.exp(cosines[name] / temperature) for name in chosen}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def assert_found(model, pool: Pool, **options) -> None:
    mixtures = experts_of(composition_of(model).lookup, PROMPTS)
    for row, text in enumerate(PROMPTS):
        got = zip(mixtures.experts[row].tolist(), mixtures.weights[row].tolist(), strict=True)
        wanted = shares(pool, text, **options)
        names = composition_of(model).experts
        assert {names[z]: w for z, w in got} == pytest.approx(wanted, abs=1e-5)


@retrieving
@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({}, {}),  # three, and 0.2
        ({"k": 1}, {"k": 1}),
        ({"k": 2, "temperature": 1.0}, {"k": 2, "temperature": 1.0}),
    ],
)
def test_the_nearest_means_are_weighted_by_the_softmax_of_their_cosines(
    llama, llama_pool, options, used
):
    assert_found(compose_by("centroid", llama_pool, llama, **options), llama_pool, **used)


def test_the_length_of_an_embedding_does_not_count(llama_pool):
    some = with_embeddings(llama_pool)
    first, *rest = some.experts
    longer = Pool((replace(first, embeddings=3 * first.embeddings), *rest))
    torch.testing.assert_close(centroids_of(longer).rows, centroids_of(some).rows)
    torch.testing.assert_close(centroids_of(some).rows.norm(dim=-1), torch.ones(4))


@retrieving
@both_streams
@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_every_row_of_a_padded_batch_is_its_mixture_by_hand(base, pool, pad):
    rows = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    wanted = []
    for text, row in zip(PROMPTS, rows, strict=True):
        ids = torch.tensor([row])
        with adding(base, pool, shares(pool, text)):
            wanted.append(passed(base, base.model, ids, torch.ones_like(ids)))
    model = compose_by("centroid", pool, base)
    ids, mask = pad(rows, 0), pad([[1] * len(row) for row in rows], 0)
    assert_same_logits(passed(base, model, ids, mask), torch.cat(wanted))


@retrieving
@both_streams
def test_beams_are_those_of_each_prompt_alone(base, pool):
    model = compose_by("centroid", pool, base)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
    pad = pad_right if base.is_encoder_decoder else pad_left
    rows = [base.tokenizer(text)["input_ids"] for text in PROMPTS[:3]]
    ids, mask = pad(rows, 0), pad([[1] * len(row) for row in rows], 0)
    got = model.generate(ids, attention_mask=mask, **options)[:, -6:]
    for row, answer in zip(rows, got, strict=True):
        alone = torch.tensor([row])
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(answer, wanted[0, -6:])


def assert_lookup_of(model, pool: Pool) -> None:
    """The centroids are those of the experts of `pool`, in the model's order."""
    names = composition_of(model).experts
    by_name = {e.name: e for e in with_embeddings(pool).experts}
    wanted = centroids_of(Pool(tuple(by_name[name] for name in names))).rows
    torch.testing.assert_close(composition_of(model).lookup.centroids, wanted)


@retrieving
def test_it_is_saved_grows_and_shrinks_in_memory(llama, llama_pool, tmp_path):
    pool, ids = with_embeddings(llama_pool), make_ids(rows=2)
    model = compose(pool.select(["e0", "e1", "e2"]), llama, router="centroid")
    add_experts(model, pool.select(["e3"]))
    wanted, logits = evaluate(model, CHOOSING).scores, logits_of(model, ids)
    assert_found(model, llama_pool)
    save(model, tmp_path / "routed")
    detach(model)
    loaded = load(tmp_path / "routed", llama)
    assert evaluate(loaded, CHOOSING).scores == wanted
    assert torch.equal(logits_of(loaded, ids), logits)
    remove_experts(loaded, ["e1"])
    assert composition_of(loaded).experts == ("e0", "e2", "e3")
    assert_lookup_of(loaded, llama_pool)


@retrieving
def test_a_folder_grows_shrinks_and_is_written_anew(llama, llama_pool, tmp_path):
    folder, pool = tmp_path / "routed", with_embeddings(llama_pool)
    save_pool(pool.select(["e0", "e1"]), folder, llama, routing=Routing(router="centroid"))
    add_to_saved(folder, pool.select(["e2", "e3"]))
    remove_from_saved(folder, ["e1"])
    for _ in range(2):
        model = load(folder, llama)
        assert composition_of(model).experts == ("e0", "e2", "e3")
        assert_lookup_of(model, llama_pool)
        detach(model)
        compact(folder)


@retrieving
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda rows: rows[:-1], "centroids has shape"),
        (lambda rows: rows[:, None], "centroids has shape"),
        (lambda rows: None, "wanted centroids"),
    ],
)
def test_a_folder_without_its_centroids_is_refused(llama, llama_pool, tmp_path, damage, complaint):
    folder = tmp_path / "routed"
    save(compose_by("centroid", llama_pool, llama), folder)
    detach(llama.model)
    tensors = load_file(folder / "routed.safetensors")
    rows = damage(tensors.pop("lookup.centroids"))
    tensors |= {} if rows is None else {"lookup.centroids": rows.contiguous()}
    save_file(tensors, folder / "routed.safetensors")
    info = json.loads((folder / "routed.json").read_text())
    info["weights_sha256"] = sha256_of(folder / "routed.safetensors")
    (folder / "routed.json").write_text(json.dumps(info))
    with pytest.raises(RoutingError, match=complaint):
        load(folder, llama)


def test_it_needs_embeddings_of_one_embedder_and_a_tokenizer(llama, llama_pool):
    with pytest.raises(PoolError, match=r"'e0', .* have no embeddings: run 'phatgoose measure'"):
        compose(llama_pool, llama, router="centroid")
    some = with_embeddings(llama_pool)
    with pytest.raises(ConfigError, match="Router centroid reads prompts"):
        compose(some, llama.model, router="centroid")
    first, *rest = some.experts
    other = replace(first, info=replace(first.info, embedder="other/embedder"))
    with pytest.raises(PoolError, match="several embedders"):
        compose(Pool((other, *rest)), llama, router="centroid")
