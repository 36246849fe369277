"""Regular expressions of strangers: matched as PEFT would, at once, or refused by name."""

import re
import time
from contextlib import contextmanager, suppress

import peft
import pytest
from peft.utils.other import get_pattern_key

from import_cases import Case, write_case
from odd_files import one_line_of, rewrite
from phatgoose.errors import ExpertError, PhatgooseError
from phatgoose.experts.adapter_files import ADAPTER_CONFIG, check_config, matching, value_at
from phatgoose.experts.importing import import_adapter

UNSLOTH = (  # what a library of that name writes into every adapter of a vision model
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|"
    r"attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj)))"
)
ORDINARY = [r".*\.(q|k|v)_proj", r"^model\.layers\.(1\d|2[0-4])\..*(self_attn|mlp)\..*_proj$"]
ORDINARY += [r"(?:.*?)\.q", r"\(a+\)+", "model.layers.0.self_attn.q_proj", "a-b", "", UNSLOTH]
NAMES = ["q_proj", "model.layers.0.self_attn.q_proj", "model.layers.13.mlp.up_proj"]
NAMES += ["language_model.layers.1.self_attn.v_proj", "x.a-b", "x.q", "x.axb", "(a)"]
SLOW = ["(a+)+$", "(.*a){20}b", ".*.*.*.*!", "a?" * 30 + "a" * 30, ".*" * 900]  # in Python
LOOKED_AROUND = ["(?x:(a|a) *)b", "(a|a)(?#x)*b", r"(a)\1", "(?=a)b", "(?i)a", "a{,3}", r"\p{L}"]


@contextmanager
def soon(seconds: float = 5):
    """A block that takes less of the processor than a matcher that goes back would."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < seconds


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_match_as_pefts_do(pattern):
    check_config({"target_modules": pattern}, "it")
    assert matching(pattern, NAMES) == [n for n in NAMES if re.fullmatch(pattern, n)]
    for name in NAMES:
        key = get_pattern_key([pattern], name)
        wanted = 7 if key == pattern and re.match(rf"(.*\.)?({pattern})$", name) else None
        assert value_at({pattern: 7}, name) == wanted, name
    assert value_at({"k_proj": 1, r".*q_proj": 2, "q_proj": 3}, "a.q_proj") == 2


@pytest.mark.parametrize("pattern", SLOW)
def test_what_takes_python_for_ever_is_matched_at_once(pattern):
    with soon():
        check_config({"target_modules": pattern, "rank_pattern": {pattern: 1}}, "it")
        matching(pattern, ["a" * 431] * 100)
        value_at({pattern: 1}, "a" * 431)


REFUSED = [  # an entry of a config, and what is said of it
    *[("target_modules", pattern, re.escape(repr(pattern))) for pattern in LOOKED_AROUND],
    *[("target_modules", p, "no name or") for p in ("(", "a**", "[", "(a|b", "\ud800(", "(\n")],
    *[("alpha_pattern", {p: 1}, "no name or") for p in ("(a{100}){100}{100}", "a[\0\0")],
    ("target_modules", "(a|b)*" * 2_500_000, "15000000 characters; at most 2000 are read"),
    ("alpha_pattern", dict.fromkeys(map(str, range(100_000)), 1), "at most 20000"),
    ("target_modules", ["q"] * 100_000, "at most 20000"),
    (
        "alpha_pattern",
        {f"[{i}]": 1 for i in range(1001)},
        "1001 regular .* at most 1000",
    ),
    ("alpha_pattern", {r"(?:[\w.]{1,60}){1,16}": 1}, "no name or"),  # it takes megabytes
    ("layers_pattern", ["layers", "(.*)*"], "is no name"),
]


@pytest.mark.parametrize(("key", "value", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_re2_does_not_match_as_python_is_refused_in_one_line(key, value, said):
    with soon(1):
        message = one_line_of(lambda: check_config({key: value}, "it"), ExpertError)
    assert message.isprintable()
    assert re.search(said, message)


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.FourierFTConfig])
def test_an_adapter_of_slow_patterns_is_read_or_refused_at_once(base_folders, tmp_path, config):
    base, pattern = base_folders["llama"], r"(model|model)*(.*)*(.*)*x"
    folder = write_case(Case("", config=config), "llama", base, tmp_path / "adapter")
    of_counts = "rank_pattern" if config is peft.LoraConfig else "n_frequency_pattern"
    whole = (folder / ADAPTER_CONFIG).read_text()
    for key in ("target_modules", "exclude_modules", of_counts):
        (folder / ADAPTER_CONFIG).write_text(whole)
        rewrite(folder / ADAPTER_CONFIG, **{key: {pattern: 3} if key == of_counts else pattern})
        with soon(), suppress(PhatgooseError):
            import_adapter(folder, tmp_path / key, base=str(base), allow_loss=0)
