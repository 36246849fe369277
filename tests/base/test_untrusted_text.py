"""Chat templates and tokenizers that want all time and memory: they fail, and others are served."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from phatgoose.errors import BaseModelError, EngineError
from phatgoose.untrusted_text import UntrustedText
from tiny import make_tokenizer, with_added

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOLDS_THE_LOCK = "{{ 9 ** (9 ** 9) }}"
DOUBLED = (
    "{% set x = namespace(y='a' * 1000) %}{% for i in range(60) %}{% set x.y = x.y + x.y %}"
    "{% endfor %}{{ x.y | length }}"
)


@pytest.fixture
def opened():
    """Makes processes that are closed after the test."""
    with ExitStack() as stack:
        yield lambda tokenizer=None: stack.enter_context(
            closing(UntrustedText(tokenizer or make_tokenizer(final_eos=False)))
        )


def limited(texts: UntrustedText) -> UntrustedText:
    """`texts`, before its start, with limits of a second of the processor and 64 MiB."""
    texts.seconds = 1
    texts.memory = 64 << 20
    return texts


def chat(texts: UntrustedText, template: object, seconds: float = 10.0) -> str:
    """What `template` writes of no messages."""
    texts._tokenizer.chat_template = template
    return texts.read([[]], seconds)[0][0]


def works(texts: UntrustedText) -> None:
    assert texts.read(["ab"]) == [["ab", 2, [67, 68]]]
    assert chat(texts, "{{ 1 }}") == "1"


@linux
@pytest.mark.parametrize("template", [HOLDS_THE_LOCK, DOUBLED], ids=["power", "doubled"])
def test_a_template_that_wants_everything_fails_and_the_next_question_is_answered(opened, template):
    texts = limited(opened())
    works(texts)
    with pytest.raises(BaseModelError, match=r"template or tokenizer failed: it took too much"):
        chat(texts, template, 60)
    assert texts.ended == 1
    works(texts)
    begun = time.monotonic()
    with pytest.raises(BaseModelError, match="it took too much time"):
        chat(texts, LOOP, 0.3)  # its deadline
    assert time.monotonic() - begun < 10
    works(texts)


def test_closing_ends_a_question_and_refuses_others(opened):
    texts = opened()
    texts.start()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(chat, texts, LOOP)
        time.sleep(0.2)
        texts.close()
        assert isinstance(asked.exception(10), EngineError)
    assert texts.ended == 0
    with pytest.raises(EngineError, match="stopped"):
        texts.read(["a"])
    texts.start()  # an application may run again
    works(texts)


def tokenizer_with(pre_tokenizer):
    tokenizer = make_tokenizer(final_eos=False)
    both = [pre_tokenizer, tokenizer.backend_tokenizer.pre_tokenizer]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(both)
    return tokenizer


@linux
def test_a_tokenizer_that_wants_everything_fails(opened):
    grows = make_tokenizer(final_eos=False)
    grows.backend_tokenizer.normalizer = normalizers.Replace("a", "b" * 100_000)
    with pytest.raises(BaseModelError, match="too much time or memory"):
        limited(opened(grows)).read(["a" * 1000], most=1000)
    texts = limited(opened(tokenizer_with(pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated"))))
    with pytest.raises(BaseModelError, match="template or tokenizer failed: "):
        texts.read(["x" * 5000])
    works(texts)


TEXTS = ["", "a", " two  words\n", "é😀\u2028", "<s>yes</s>", "x" * 3000]


@pytest.mark.parametrize("split", [False, True])
def test_tokens_and_texts_are_those_of_the_tokenizer(opened, split):
    tokenizer = with_added(["<s>"], ["</s>"])
    tokenizer.split_special_tokens = split
    texts = opened(tokenizer)
    for most in (2, 10_000):
        cut = [text[:most] for text in TEXTS]
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"][:most] for text in cut]
        wanted = [[t, len(whole), i] for t, whole, i in zip(cut, TEXTS, tokens, strict=True)]
        assert texts.read(TEXTS, most=most) == wanted


def test_a_tokenizer_that_no_file_describes_is_used_here(opened):
    class Marked:
        def pre_tokenize(self, text):
            text.split(lambda _, piece: [piece])

    works(opened(tokenizer_with(pre_tokenizers.PreTokenizer.custom(Marked()))))


@linux
def test_a_process_has_no_secrets_is_replaced_when_lost_and_ends_with_its_owner(
    opened, monkeypatch
):
    monkeypatch.setenv("PHATGOOSE_API_KEYS", "secret")
    texts = opened()
    texts.start()
    first = texts._children[0]
    assert b"secret" not in Path(f"/proc/{first.pid}/environ").read_bytes()
    first.kill()
    first.wait()
    works(texts)
    assert texts.ended == 0
    second = texts._children[0]
    texts.close()
    assert second.poll() is not None


def test_a_program_that_ends_leaves_no_process_behind():
    program = (
        "from tokenizers import Tokenizer, models\n"
        "from transformers import PreTrainedTokenizerFast as Fast\n"
        "from phatgoose.untrusted_text import UntrustedText\n"
        "texts = UntrustedText(Fast(tokenizer_object=Tokenizer(models.BPE())))\n"
        "texts.start()\nprint(texts._children[0].pid)"
    )
    words = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


# As models on the Hub have them: with a date, and with what transformers adds to jinja.
TEMPLATE = (
    "{{- bos_token }}\n{%- if strftime_now is defined %}\n    {%- set date_string = "
    'strftime_now("%d %b %Y") %}\n{%- endif %}\n{{- "Today Date: " + date_string + "\n\n" }}\n'
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}"
    "{% endgeneration %}{% else %}{{ m | tojson(indent=1) }}{% continue %}{% endif %}"
    "{% endfor %}{{ dict(a='ä', b='<&>') | tojson }}{{ namespace(self=1).self }}{{ eos_token }}"
    "{{ add_generation_prompt }}"
)
CHAT = [
    {"role": "user", "content": "é\u2028<&>'\""},
    {"role": "assistant", "content": "yes  "},
    {"role": "user", "content": "😀 {{ 1 }}", "name": "Ann"},
]


def test_a_template_writes_what_transformers_does(opened):
    tokenizer = make_tokenizer(final_eos=False)
    texts = opened(tokenizer)
    tokenizer.chat_template = {"default": TEMPLATE, "rag": ""}
    for how in ({"add_generation_prompt": begins} for begins in (True, False)):
        wanted = tokenizer.apply_chat_template(CHAT, tokenize=False, **how)
        assert texts.read([CHAT], **how)[0][0] == wanted


def test_a_template_s_own_error_is_told_and_ends_no_process(opened):
    texts = opened()
    for template, words in (
        ("{{ raise_exception('a\nb') }}", "failed: TemplateError: a b"),
        ("{{ messages.__class__.__mro__ }}", "failed: SecurityError: "),
        ({"tool_use": "a", "rag": "b"}, "the base has no default chat template"),
    ):
        with pytest.raises(BaseModelError, match=words):
            chat(texts, template)
    assert texts.ended == 0
