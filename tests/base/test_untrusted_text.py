"""Chat templates and tokenizers that want all time and memory: they fail, and others are served."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from phatgoose.base import untrusted_text
from phatgoose.base.untrusted_text import UntrustedText, chat_of, render_chat
from phatgoose.errors import BaseModelError, EngineError
from tiny import make_tokenizer, with_added

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOLDS_THE_LOCK = "{{ 9 ** (9 ** 9) }}"
DOUBLED = (
    "{% set x = namespace(y='a' * 1000) %}{% for i in range(60) %}{% set x.y = x.y + x.y %}"
    "{% endfor %}{{ x.y | length }}"
)
HUGE = "{{ 'a' * 10 ** 10 }}"


@pytest.fixture
def short(monkeypatch):
    """Limits of a second of the processor and 64 MiB."""
    monkeypatch.setattr(untrusted_text, "SECONDS", 1)
    monkeypatch.setattr(untrusted_text, "MEMORY", 64 << 20)


@pytest.fixture
def opened():
    """Makes processes that are closed after the test."""
    made: list[UntrustedText] = []

    def make(tokenizer=None) -> UntrustedText:
        made.append(UntrustedText(tokenizer or make_tokenizer(final_eos=False)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def works(texts: UntrustedText) -> None:
    (found,) = texts.tokens(["ab"], most=9)
    assert found == ([67, 68], 2)
    assert texts.chat("{{ 1 }}", {}) == ("1", 1)


@linux
@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LOOP, "more than 1 seconds of the processor"),
        (HOLDS_THE_LOCK, "more than 1 seconds of the processor"),
        (DOUBLED, "too much memory"),
        (HUGE, "too much memory"),
    ],
    ids=["loop", "power", "doubled", "huge"],
)
def test_a_template_that_wants_everything_fails_and_the_next_question_is_answered(
    short, opened, template, why
):
    texts = opened()
    works(texts)
    with pytest.raises(BaseModelError, match=f"^The base's chat template failed: .*{why}"):
        texts.chat(template, {})
    assert texts.ended == 1
    works(texts)


def test_a_question_ends_at_its_deadline_while_this_process_goes_on(opened):
    texts = opened()
    texts.start()
    begun = time.monotonic()
    with pytest.raises(BaseModelError, match="it took too long"):
        texts.chat(HOLDS_THE_LOCK, {}, untrusted_text.TimeLeft(0.3))
    assert time.monotonic() - begun < 10
    works(texts)


def test_closing_ends_a_question_and_refuses_others(opened):
    texts = opened()
    texts.start()
    found = []

    def ask() -> None:
        try:
            texts.chat(LOOP, {})
        except EngineError as error:
            found.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    texts.close()
    thread.join(10)
    assert len(found) == 1
    assert texts.ended == 0
    with pytest.raises(EngineError, match="stopped"):
        texts.tokens(["a"], most=9)
    texts.start()  # an application may run again
    works(texts)


def tokenizer_with(*, normalizer=None, pre_tokenizer=None):
    tokenizer = make_tokenizer(final_eos=False)
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        before = [pre_tokenizer, tokenizer.backend_tokenizer.pre_tokenizer]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(before)
    return tokenizer


@linux
def test_a_tokenizer_that_wants_everything_fails(short, opened):
    grows = normalizers.Replace("a", "b" * 100_000)
    with pytest.raises(BaseModelError, match=r"^The base's tokenizer failed: "):
        opened(tokenizer_with(normalizer=grows)).tokens(["a" * 1000], most=10)
    splits = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    texts = opened(tokenizer_with(pre_tokenizer=splits))
    with pytest.raises(BaseModelError, match=r"^The base's tokenizer failed: "):
        texts.tokens(["x" * 5000], most=10_000)
    works(texts)


TEXTS = ["", "a", " two  words\n", "é😀\u2028", "<s>yes</s>", "x" * 3000]


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_tokenizer(final_eos=False),
        lambda: make_tokenizer(final_eos=True),
        lambda: with_added(["<s>"], ["</s>"]),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_tokens_and_texts_are_those_of_the_tokenizer(opened, make, split):
    tokenizer = make()
    tokenizer.split_special_tokens = split
    texts = opened(tokenizer)
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert texts.tokens(TEXTS, most=9999) == [(each, len(each)) for each in wanted]
    assert [each for each, _ in texts.tokens(TEXTS, most=2)] == [each[:2] for each in wanted]
    decoded = [tokenizer.decode(each, skip_special_tokens=True) for each in wanted]
    assert texts.texts(wanted) == decoded


def test_a_tokenizer_that_no_file_describes_is_used_here(opened):
    class Marked:
        def pre_tokenize(self, text):
            text.split(lambda _, piece: [piece])

    own = pre_tokenizers.PreTokenizer.custom(Marked())
    texts = opened(tokenizer_with(pre_tokenizer=own))
    works(texts)
    assert texts.texts([[67, 68]]) == ["ab"]


def test_the_process_has_none_of_the_environment_s_secrets(opened, monkeypatch):
    monkeypatch.setenv("PHATGOOSE_API_KEYS", "secret")
    texts = opened()
    texts.start()
    environment = Path(f"/proc/{texts._process._child.pid}/environ")
    if not environment.exists():
        pytest.skip("needs /proc")
    assert b"secret" not in environment.read_bytes()


def test_a_process_ends_with_its_owner_and_a_lost_one_is_replaced(opened):
    texts = opened()
    texts.start()
    first = texts._process._child
    first.kill()
    first.wait()
    works(texts)
    assert texts.ended == 0
    second = texts._process._child
    texts.close()
    assert second.poll() is not None


def test_a_program_that_ends_leaves_no_process_behind():
    program = (
        "from phatgoose.base.untrusted_text import UntrustedText\n"
        "texts = UntrustedText()\ntexts.chat('a', {})\nprint(texts._process._child.pid)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_a_chat_is_rendered_with_the_tokenizer_s_special_tokens():
    tokenizer = make_tokenizer(final_eos=False)
    tokenizer.chat_template = "{{ messages[0].content }}{{ eos_token }}{{ add_generation_prompt }}"
    messages = [{"role": "user", "content": "é\ud800"}]
    assert render_chat(tokenizer, messages) == "é\ud800</s>True"
    tokenizer.chat_template = {"tool_use": "a", "rag": "b"}
    with pytest.raises(BaseModelError, match="multiple chat templates with no default"):
        chat_of(tokenizer, messages)


def test_a_chat_that_a_template_makes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(untrusted_text, "MOST_CHARACTERS", 10)
    tokenizer = make_tokenizer(final_eos=False)
    tokenizer.chat_template = "{{ 'a' * 11 }}"
    with pytest.raises(BaseModelError, match="writes 11 characters; at most 10 are read"):
        render_chat(tokenizer, [])
