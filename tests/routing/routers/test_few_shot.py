"""Router few-shot: the expert of a few examples, beside likelihoods of single experts."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phatgoose.config import Routing
from phatgoose.errors import ConfigError, PoolError, TaskError
from phatgoose.evaluation.likelihood import choice_log_likelihoods
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.composition import composition_of
from phatgoose.routing.routers.registry import router_of
from phatgoose.routing.saved import load, save
from phatgoose.tasks.encoding import Encoder
from routed_models import with_embeddings
from tiny import logits_of, make_ids
from topic_prompts import both_streams, retrieving

INPUTS = ("plums or apples", "5 + 6 = 11, 1 + 9", "WHO?", "zigzag jazz;")


def written(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chosen(model) -> str | None:
    return composition_of(model).router.chosen or None


@retrieving
@pytest.mark.parametrize(
    ("inputs", "expert"),
    [(["plums or apples", "apples"], "e0"), (["WHO? WHAT?", "WHAT? WHERE?", "apples"], "e2")],
)
def test_without_targets_the_best_mean_score_chooses(llama, llama_pool, tmp_path, inputs, expert):
    pool = with_embeddings(llama_pool)
    path = written(tmp_path, [{"input": text, "choices": ["a"]} for text in inputs])
    model = compose(pool, llama, router=f"few-shot:examples={path},by=centroid")
    assert chosen(model) == expert
    ids = make_ids(rows=2)
    got = logits_of(model, ids)
    detach(model)
    alone = compose(pool, llama, router=f"single:expert={expert}")
    torch.testing.assert_close(got, logits_of(alone, ids))


def solved(base, model, rows: list[dict[str, object]]) -> tuple[float, float]:
    """(share whose target ranks first, mean log-likelihood of targets), by the ranking's code."""
    encoder, asked = Encoder.for_model(model, base.tokenizer), []
    listed = [row.get("choices", [row["target"]]) for row in rows]
    for row, choices in zip(rows, listed, strict=True):
        pairs = [encoder.pair(row["input"], choice) for choice in choices]
        asked.append((pairs[0].prompt, [pair.target for pair in pairs]))
    found = dict(choice_log_likelihoods(model, asked, base.tokenizer.pad_token_id, 4096))
    places = [choices.index(row["target"]) for row, choices in zip(rows, listed, strict=True)]
    right = [max(found[i]) == found[i][place] for i, place in enumerate(places)]
    likely = [found[i][place] for i, place in enumerate(places)]
    return sum(right) / len(rows), sum(likely) / len(rows)


def solved_by_each(base, pool: Pool, rows: list[dict[str, object]]) -> dict:
    """`solved` by the base alone, None, and under every expert, by name."""
    found = {None: solved(base, base.model, rows)}
    for name in pool.names:
        found[name] = solved(base, compose(pool, base, router=f"single:expert={name}"), rows)
        detach(base.model)
    return found


@both_streams
@pytest.mark.parametrize("router", ["few-shot", "few-shot:by=discriminant"])
def test_with_targets_the_likeliest_expert_is_chosen(base, pool, tmp_path, router):
    found = set()
    for target in ("pears", "10", "zigzag", "9 9 9 9", "WHERE? WHERE?"):
        rows = [{"input": text, "target": target} for text in INPUTS]
        wanted = solved_by_each(base, pool, rows)
        path = written(tmp_path, rows)
        text = f"{router}{',' if ':' in router else ':'}examples={path}"
        model = compose(pool, base, router=text)
        best = max(wanted, key=wanted.__getitem__)
        assert wanted[chosen(model)] == pytest.approx(wanted[best], abs=1e-5)
        found.add(chosen(model))
        detach(model)
    assert len(found) > 1


def test_with_choices_whichever_solves_most_examples_is_chosen(llama, llama_pool, tmp_path):
    choices = ["pears", "10", "zigzag", "9 9 9 9", "WHERE? WHERE?"]
    others = 0  # files for which likelihood alone would choose another expert
    for seed in range(12):
        targets = random.Random(seed).choices(choices, k=len(INPUTS))
        rows = [
            {"input": text, "target": target, "choices": choices}
            for text, target in zip(INPUTS, targets, strict=True)
        ]
        wanted = solved_by_each(llama, llama_pool, rows)
        path = written(tmp_path, rows)
        model = compose(llama_pool, llama, router=f"few-shot:examples={path}")
        best = max(wanted.values())
        assert wanted[chosen(model)] == pytest.approx(best, abs=1e-5)
        detach(model)
        others += max(wanted.values(), key=lambda pair: pair[1]) != best
    assert others


@retrieving
def test_the_choice_is_saved_and_needs_no_examples_again(llama, llama_pool, tmp_path):
    path = written(tmp_path, [{"input": "WHO? WHAT?"}])
    pool, ids = with_embeddings(llama_pool), make_ids(rows=2)
    model = compose(pool, llama, router=f"few-shot:examples={path},by=centroid")
    wanted = logits_of(model, ids)
    save(model, tmp_path / "routed")
    detach(model)
    path.unlink()
    assert torch.equal(logits_of(load(tmp_path / "routed", llama), ids), wanted)
    for file in ("routed.json", "README.md"):  # whose place is no one else's business
        said = (tmp_path / "routed" / file).read_text()
        assert "few-shot:by=centroid" in said
        assert path.name not in said


def test_examples_come_in_all_forms_of_a_task(tmp_path):
    rows = [{"input": text, "target": "zigzag"} for text in INPUTS]
    alike = [{"prompt": row["input"], "completion": row["target"]} for row in rows]
    (tmp_path / "few.json").write_text(json.dumps(alike))
    with (tmp_path / "few.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["input", "target"])
        writer.writeheader()
        writer.writerows(rows)
    found = {
        str(path): router_of(Routing(f"few-shot:examples={path}")).file_digest
        for path in (written(tmp_path, rows), tmp_path / "few.json", tmp_path / "few.csv")
    }
    assert len(set(found.values())) == 1
    some = [rows[0], {"input": INPUTS[1]}]  # so that no target counts
    without = [{"input": row["input"]} for row in some]
    path = written(tmp_path, some)
    given = router_of(Routing(f"few-shot:examples={path}")).file_digest
    assert (
        router_of(Routing(f"few-shot:examples={written(tmp_path, without)}")).file_digest == given
    )
    assert given not in found.values()


def bare(pool: Pool) -> Pool:
    return Pool(tuple(replace(expert, readings={}, embeddings=None) for expert in pool.experts))


def test_what_can_t_be_chosen_by_is_refused(llama, llama_pool, tmp_path):
    with pytest.raises(ConfigError, match="needs few-shot:examples=FILE of"):
        compose(llama_pool, llama, router="few-shot")
    path = written(tmp_path, [{"input": "apples"}])
    text = f"few-shot:examples={path}"
    with pytest.raises(PoolError, match="neither: run 'phatgoose stats'"):
        compose(bare(llama_pool), llama, router=text)
    with pytest.raises(PoolError, match="have no embeddings"):
        compose(llama_pool, llama, router=f"{text},by=retrieval")
    with pytest.raises(ConfigError, match="tokenizer"):
        compose(llama_pool, llama.model, router=text)
    for content, message in (
        ("", "few.jsonl has no examples"),
        ("apples", "few.jsonl, line 1 is not valid: Expecting value"),
        ("{}", "few.jsonl, line 1: input is missing"),
        ('{"input": "plums", "split": "test"}', "few.jsonl has no examples of split train"),
    ):
        path.write_text(content)
        with pytest.raises(TaskError, match=message):
            compose(llama_pool, llama, router=text)
