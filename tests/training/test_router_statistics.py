"""Statistics of an expert: at training or later, the same numbers, and nothing else changes."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phatgoose.base.identity import BaseReference
from phatgoose.config import Formatting, GateTraining, Lora, Training
from phatgoose.errors import ExpertError, TaskError, WrongBaseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.statistics import prompt_statistics_of
from phatgoose.reader import open_reader
from phatgoose.routing.opening import open_chooser
from phatgoose.tasks.batching import messages_by
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, EMBEDDERS
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.loading import load_prompts
from phatgoose.tasks.task import Chat, Example, Task
from phatgoose.training.train_expert import measure, train_expert, written_prompts
from tiny import make_adapter
from toy_embedders import use_toy_embedder

TASK = Task("count", tuple(Example(f"count {i} and on", str(i)) for i in range(20)))
TRAINING = Training(steps=2, batch_size=4, eval_every=2, learning_rate=0.05, seed=3)


@pytest.fixture(autouse=True)
def _embedder(monkeypatch):
    use_toy_embedder(monkeypatch)


def train(base, out: Path, formatting: Formatting | None = None, **statistics) -> Expert:
    return train_expert(
        base,
        TASK,
        out=out,
        peft=Lora(rank=2, alpha=4),
        training=TRAINING,
        gate_training=GateTraining(joint=True, **statistics),
        formatting=formatting,
    )


def measured(expert, base, examples: int = 1000, **parts) -> Expert:
    """The expert measured on TASK, without embeddings unless `parts` say otherwise."""
    return measure(expert, base, TASK, GateTraining(statistics_examples=examples, **parts))


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_is_measured_later_is_what_training_measures(base, tmp_path):
    wanted = train(base, tmp_path / "a" / "count", embeddings=True, statistics_examples=7)
    bare = train(base, tmp_path / "b" / "count", means=False, readings=False)
    assert (dict(bare.means), dict(bare.prompt_statistics), bare.embeddings) == ({}, {}, None)
    got = measured(bare.directory, base, examples=7, embeddings=True)
    assert same(got.means, wanted.means)
    assert same(got.prompt_statistics, wanted.prompt_statistics)
    assert torch.equal(got.embeddings, wanted.embeddings)
    assert (len(got.embeddings), got.info.prompts_read) == (7, 7)
    assert got.info.reader == open_reader().reference
    assert (bare.info.reader, bare.info.prompts_read) == (None, None)
    assert got.info == replace(wanted.info, metrics=got.info.metrics)  # which hold times


def test_whatever_seed_an_expert_records_it_can_be_measured(llama, make_expert, tmp_path):
    expert = make_expert(llama, "one", seed=1)
    odd = replace(expert, info=replace(expert.info, hyperparameters={"seed": 10**30}))
    assert measured(odd.save(tmp_path / "odd"), llama, means=False).has("prompt_statistics")


def test_what_is_not_asked_for_stays(llama, tmp_path):
    expert = train(llama, tmp_path / "count", embeddings=True)
    got = measured(expert, llama, examples=3)
    assert torch.equal(got.embeddings, expert.embeddings)
    assert not same(got.means, expert.means)
    again = measured(got, llama, examples=4, means=False, embeddings=True, embedder="other")
    assert same(again.means, got.means)
    assert (len(again.embeddings), again.info.embedder) == (4, "other")
    assert again.info.measured_in == expert.info.measured_in == "torch.float32"
    unread = measured(again, llama, examples=3, means=False, readings=False)
    assert same(unread.prompt_statistics, again.prompt_statistics)
    assert (unread.info.reader, unread.info.prompts_read) == (expert.info.reader, 4)
    other = measured(again, llama, examples=3, means=False, reader="minilm:1-1")
    assert str(Expert.load(other.directory).info.reader) == "minilm:1-1"
    assert (other.info.prompts_read, other.prompt_statistics["whole.mean"].shape) == (3, (1, 384))
    packed = torch.nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    llama.model.lm_head.register_parameter("packed", packed)  # as quantised layers have some
    # Which means alone are of.
    for means, wanted in ((False, "torch.float32"), (True, "torch.float32, Parameter")):
        found = measured(again, llama, examples=4, means=means)
        assert Expert.load(found.directory).info.measured_in == wanted
    recorded = {"means": True, "embeddings": True, "statistics_examples": 4, "embedder": "other"}
    assert recorded.items() <= again.info.hyperparameters.items()


@pytest.mark.parametrize("form", ["prompt", "paper"])
@pytest.mark.filterwarnings("ignore:.*cut to 3 tokens:UserWarning")
def test_what_is_embedded_is_recorded(llama, tmp_path, form):
    expert = train(llama, tmp_path / "count", Formatting(max_input_tokens=3, truncation="right"))
    settings = GateTraining(means=False, embeddings=True, embedding_form=form)
    info = measure(expert, llama, TASK, settings).info
    assert info.embedding_form == info.hyperparameters["embedding_form"] == form
    whole = [each.input for each in TASK.with_validation(TRAINING.seed).train]
    seen = EMBEDDERS[DEFAULT_EMBEDDER].texts
    if form == "paper":
        assert seen == [f"Answer Choices: None, Instance: {text}" for text in whole]
    else:  # not cut, as texts come to a router
        assert seen == whole


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_prompts_without_targets_are_enough(llama, tmp_path, count):
    expert = train(llama, tmp_path / "count")
    texts = [f"count {i} and on" for i in range(count)]
    settings = GateTraining(embeddings=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = measure(expert, llama, load_prompts(texts), settings)
    complaints = [str(each.message) for each in told if "few" in str(each.message)]
    wanted = f"count: few prompts ({count}); give at least 3, better 5."
    assert complaints == [wanted] * (count < 3)
    assert same(got.means, expert.means)  # which need targets
    assert (got.info.prompts_read, len(got.embeddings)) == (count, count)
    assert same(got.prompt_statistics, prompt_statistics_of(open_reader().states(texts)))
    assert all(each.isfinite().all() for each in got.prompt_statistics.values())


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.filterwarnings("ignore:.*few prompts:UserWarning")
def test_experts_of_one_to_three_prompts_are_told_apart(llama, tmp_path, most):
    texts = {"a": ["Once more"], "b": ["1 + 2 =", "12 + 7 ="], "c": ["wow!!", "ha!", "no!!!"]}
    for name in texts:
        train(llama, tmp_path / name, means=False, readings=False)
        measure(tmp_path / name, llama, load_prompts(texts[name][:most]), GateTraining())
    router = open_chooser(tmp_path, llama.tokenizer, router="discriminant")
    choice = router.choose([texts[name][0] for name in texts])
    assert [next(iter(each)) for each in choice.named(router.experts)] == ["a", "b", "c"]


@pytest.mark.filterwarnings("ignore:.*few prompts:UserWarning")
def test_of_chats_the_last_message_is_read_and_no_base_is_needed_but_for_means(llama, tmp_path):
    expert = train(llama, tmp_path / "count")
    before = [("system", "Be brief."), ("user", "1"), ("assistant", "2")]
    turns = [[*before, ("user", f"{i} and on")] for i in range(3)]
    chats = Task("chats", tuple(Example(Chat(each), "3") for each in turns))
    got = measure(expert, None, chats, GateTraining())
    asked = [each.input.turns[-1][1] for each in chats.with_validation(TRAINING.seed).train]
    wanted = prompt_statistics_of(open_reader().states(asked))
    for part, values in wanted.items():
        torch.testing.assert_close(got.prompt_statistics[part], values)
    assert same(got.means, expert.means)
    changed = replace(llama, fingerprint="sha256:" + "0" * 64)
    with pytest.raises(WrongBaseError, match="The base of expert 'count' is"):
        measure(expert, changed, chats, GateTraining(means=False))


def written(expert, base, after: str = "</u>") -> list[str]:
    """What `expert` writes where `after` follows a user's message in the chat template."""
    base.tokenizer.chat_template = "<u>{{ messages[0].content }}" + after
    return [example.input for example in written_prompts(expert, base).train]


def test_an_expert_writes_the_same_prompts_again_and_others_than_the_base(llama, make_expert):
    expert = make_expert(llama, "one")
    texts = written(expert, llama)
    assert len(set(texts)) > 20
    assert texts == written(expert, llama)
    assert not set(texts) & set(messages_by(llama.model, Encoder.of(llama), 32, 120, 0))
    assert len(set(messages_by(llama.model, Encoder.of(llama), 500, 1, 0))) > 50  # of any token
    seeded, odd = (
        replace(expert, info=replace(expert.info, hyperparameters={"seed": seed}))
        for seed in (1, 10**30)
    )
    others = [written(each, llama) for each in (seeded, odd, make_expert(llama, "two", seed=1))]
    assert texts not in others


def test_a_written_prompt_ends_where_a_message_does_and_is_left_out_if_empty(llama, make_expert):
    expert = make_expert(llama, "one")
    whole = written(expert, llama, "\n~~~~\n")
    ended = [text.partition("e")[0].strip() for text in whole]
    assert written(expert, llama, "\n e\n<a>") == [text for text in ended if text] != whole
    llama.tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})  # known to llama
    assert "<end>" not in "".join(written(expert, llama)) != "".join(whole)
    llama.model.generation_config.eos_token_id = list(range(200))
    few = written(expert, llama)
    assert all(few)
    assert 0 < len(few) < 32
    llama.model.generation_config.eos_token_id = list(range(300))
    with pytest.raises(TaskError, match="'one' writes no prompts"):
        written(expert, llama)


def test_another_base_or_foreign_files_are_refused_and_nothing_is_lost(llama, tmp_path):
    expert = train(llama, tmp_path / "count")
    changed = replace(llama, fingerprint="sha256:" + "0" * 64)
    with pytest.raises(WrongBaseError, match="The base of expert 'count' is"):
        measured(expert, changed)
    with pytest.raises(WrongBaseError, match="The base of expert 'count' is"):
        written_prompts(expert, changed)
    with pytest.raises(TaskError, match="0 training examples"):
        measure(expert, llama, Task("held out", test=TASK.train), GateTraining())
    (expert.directory / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in expert.directory.iterdir()}
    with pytest.raises(ExpertError, match=r"also holds notes\.txt"):
        measured(expert, llama)
    assert {path.name: path.read_bytes() for path in expert.directory.iterdir()} == before


def test_an_unknown_base_is_taken_on_trust(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter")
    reference = BaseReference(llama.id, None, None)
    old = Expert.from_peft(adapter, {}, name="old", base=reference).save(tmp_path / "old")
    with pytest.warns(UserWarning, match="No fingerprint is recorded of the base of expert 'old'"):
        assert measured(old, llama).means
