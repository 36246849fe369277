"""Few-shot: the expert of a few examples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from discriminants import trained_on
from phatgoose.errors import ConfigError, PoolError, TaskError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, detach, load, save
from routed_models import with_embeddings
from tiny import logits_of, make_ids
from topic_prompts import retrieving, scores_of

INPUTS = ("plums or apples", "5 + 6 = 11, 1 + 9", "WHO?", "zigzag jazz;")


def written(folder: Path, *inputs: str) -> Path:
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps({"input": text}) + "\n" for text in inputs))
    return path


@retrieving
@pytest.mark.parametrize(
    ("inputs", "expert"),
    [(["plums or apples", "apples"], "e0"), (["WHO? WHAT?", "WHAT? WHERE?", "apples"], "e2")],
)
def test_the_best_mean_score_chooses_once_for_all(llama, llama_pool, tmp_path, inputs, expert):
    path, ids = written(tmp_path, *inputs), make_ids(rows=2)
    model = compose(llama_pool, llama, router=f"single:expert={expert}")
    wanted = logits_of(model, ids)
    detach(model)
    pool = with_embeddings(llama_pool)
    model = compose(pool, llama, router=f"few-shot:examples={path},by=centroid")
    got = logits_of(model, ids)
    torch.testing.assert_close(got, wanted)
    save(model, tmp_path / "routed")
    detach(model)
    path.unlink()  # saved, the choice needs no examples again
    assert torch.equal(logits_of(load(tmp_path / "routed", llama), ids), got)
    saved = (tmp_path / "routed" / "routed.json").read_text()
    assert "few-shot:by=centroid" in saved
    assert path.name not in saved  # whose place is no one else's business


@pytest.mark.parametrize("in_chats", [False, True])
def test_one_example_chooses_as_discriminant_does(llama, llama_pool, tmp_path, in_chats):
    pool = trained_on(llama_pool)
    every = set()
    for text in INPUTS:
        path = written(tmp_path, text)
        if in_chats:
            turns = [("system", INPUTS[0]), ("user", INPUTS[1]), ("assistant", "?"), ("user", text)]
            messages = [{"role": role, "content": content} for role, content in turns]
            path.write_text(
                json.dumps({"messages": [*messages, {"role": "assistant", "content": "!"}]})
            )
        model = compose(pool, llama, router=f"few-shot:examples={path}")
        chosen = composition_of(model).router.chosen
        every.add(chosen)
        detach(model)
        model = compose(pool, llama, router="discriminant")
        assert pool.names[scores_of(model, [text]).argmax()] == chosen
        detach(model)
    assert len(every) > 2


@pytest.mark.parametrize(
    ("content", "settings", "bare", "error", "message"),
    [
        (None, "", False, ConfigError, "needs few-shot:examples=FILE of"),
        (
            '{"input": "apples"}',
            "",
            True,
            PoolError,
            "have no prompt_statistics: run 'phatgoose stats'",
        ),
        ('{"input": "apples"}', ",by=retrieval", False, PoolError, "have no embeddings"),
        ('{"input": "x", "split": "test"}', "", False, ConfigError, "with rows to train on"),
        ("apples", "", False, TaskError, r"few.jsonl, line 1 is not valid"),
    ],
)
def test_what_can_t_be_chosen_by_is_refused(
    llama, llama_pool, tmp_path, content, settings, bare, error, message
):
    pool = (
        Pool(tuple(replace(e, prompt_statistics={}) for e in llama_pool.experts))
        if bare
        else llama_pool
    )
    path = written(tmp_path)
    path.write_text(content or "")
    router = f"few-shot:examples={path}{settings}" if content else "few-shot"
    with pytest.raises(error, match=message):
        compose(pool, llama, router=router)
