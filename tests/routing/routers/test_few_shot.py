"""Router few-shot: the expert of a few examples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phatgoose.errors import ConfigError, PoolError, TaskError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach, load, save
from routed_models import with_embeddings
from tiny import logits_of, make_ids
from topic_prompts import experts_of, retrieving

INPUTS = ("plums or apples", "5 + 6 = 11, 1 + 9", "WHO?", "zigzag jazz;")


def written(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@retrieving
@pytest.mark.parametrize(
    ("inputs", "expert"),
    [(["plums or apples", "apples"], "e0"), (["WHO? WHAT?", "WHAT? WHERE?", "apples"], "e2")],
)
def test_the_best_mean_score_chooses(llama, llama_pool, tmp_path, inputs, expert):
    pool = with_embeddings(llama_pool)
    path = written(tmp_path, [{"input": text, "choices": ["a"]} for text in inputs])
    model = compose(pool, llama, router=f"few-shot:examples={path},by=centroid")
    assert composition_of(model).router.chosen == expert
    ids = make_ids(rows=2)
    got = logits_of(model, ids)
    detach(model)
    alone = compose(pool, llama, router=f"single:expert={expert}")
    torch.testing.assert_close(got, logits_of(alone, ids))


def test_one_example_chooses_as_discriminant_does(llama, llama_pool, tmp_path):
    for text in INPUTS:
        path = written(tmp_path, [{"input": text, "target": "zigzag"}])
        model = compose(llama_pool, llama, router=f"few-shot:examples={path}")
        chosen = composition_of(model).router.chosen
        detach(model)
        model = compose(llama_pool, llama, router="discriminant")
        assert experts_of(model, [text]).named(llama_pool.names) == [{chosen: 1.0}]
        detach(model)


@retrieving
def test_the_choice_is_saved_and_needs_no_examples_again(llama, llama_pool, tmp_path):
    path = written(tmp_path, [{"input": "WHO? WHAT?"}])
    pool, ids = with_embeddings(llama_pool), make_ids(rows=2)
    model = compose(pool, llama, router=f"few-shot:examples={path},by=centroid")
    wanted = logits_of(model, ids)
    save(model, tmp_path / "routed")
    detach(model)
    path.unlink()
    loaded = load(tmp_path / "routed", llama)
    assert torch.equal(logits_of(loaded, ids), wanted)
    for file in ("routed.json", "README.md"):  # whose place is no one else's business
        said = (tmp_path / "routed" / file).read_text()
        assert "few-shot:by=centroid" in said
        assert path.name not in said


def bare(pool: Pool) -> Pool:
    return Pool(tuple(replace(expert, readings={}, embeddings=None) for expert in pool.experts))


def test_what_can_t_be_chosen_by_is_refused(llama, llama_pool, tmp_path):
    path = written(tmp_path, [{"input": "apples"}])
    text = f"few-shot:examples={path}"
    for pool, base, router, error, message in (
        (llama_pool, llama, "few-shot", ConfigError, "needs few-shot:examples=FILE of"),
        (bare(llama_pool), llama, text, PoolError, "lack: run 'phatgoose stats'"),
        (llama_pool, llama, f"{text},by=retrieval", PoolError, "have no embeddings"),
    ):
        with pytest.raises(error, match=message):
            compose(pool, base, router=router)
    path.write_text('{"input": "plums", "split": "test"}')
    with pytest.raises(ConfigError, match="with rows to train on"):
        compose(llama_pool, llama, router=text)
    path.write_text("apples")
    with pytest.raises(TaskError, match=r"few.jsonl, line 1 is not valid"):
        compose(llama_pool, llama, router=text)
