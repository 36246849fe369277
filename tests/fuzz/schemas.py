"""Strange JSON schemas: each is compiled within limits and followed at random, or refused.

    python tests/fuzz/schemas.py SECONDS [SEED]

They have cycles of $ref, nested oneOf, large enums and long patterns. It stops at the first one
that takes this process more than MOST_COMPILING or, for a token, MOST_STEP seconds of processor
time, or MOST_BYTES of memory, and shows it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer

from phatgoose.apps.server.local import json_form
from phatgoose.base.smollm2 import smollm2_folder
from phatgoose.errors import EngineError
from phatgoose.untrusted_text import resident

LIMITS = json_form.Limits()
MOST_COMPILING = 2 * LIMITS.seconds  # here, where other threads share the processor
MOST_STEP = 0.5
MOST_BYTES = 200 << 20
STEPS = 60


def pattern(chance: random.Random) -> str:
    n, m = chance.randrange(1, 40), chance.choice((3, 60, 900))
    piece = chance.choice((".*a.{%d}b.*", "(a|b){%d,}c", "[^x]{0,%d}", "(x+y?){%d}z", "^.{%d}$"))
    return piece % n * chance.choice((1, 1, 2, 8)) + "q" * chance.choice((0, 0, m))


def number(chance: random.Random) -> dict[str, object]:
    limits = {"multipleOf": chance.choice((3, 7, 0.25, 101, 10007, 10009, 99991, 999983))}
    if chance.random() < 0.5:
        limits["minimum"] = -(10 ** chance.randrange(30))
        limits["maximum"] = 10 ** chance.randrange(30)
    return {"type": chance.choice(("integer", "number")), **limits}


def leaf(chance: random.Random) -> dict[str, object]:
    kind, size = chance.randrange(5), 10 ** chance.randrange(8)
    if kind == 0:
        return {"type": "string", "pattern": pattern(chance)}
    if kind == 1:
        return {"enum": [f"{chance.random()}" for _ in range(min(size, 2000))]}
    if kind == 2:
        return {"$ref": chance.choice(("#", "#/$defs/a"))}
    if kind == 3:
        return {"type": "string", "minLength": size // 100, "maxLength": size}
    return number(chance)


def schema(chance: random.Random, depth: int = 3) -> dict[str, object]:
    """Any schema; `#` and `#/$defs/a` are there."""
    if depth == 0 or chance.random() < 0.3:
        return leaf(chance)
    size = chance.choice((1, 2, 3, 5))
    several = [schema(chance, depth - 1) for _ in range(size)]
    named = {f"k{n}": each for n, each in enumerate(several)}
    kind = chance.randrange(5)
    if kind == 0:
        return {"type": "object", "properties": named, "required": list(named)[::2]}
    if kind == 1:
        return {"type": "object", "patternProperties": {pattern(chance): each for each in several}}
    if kind == 2:
        return {"type": "array", "prefixItems": several, "items": several[0], "minItems": size**9}
    return {chance.choice(("allOf", "anyOf", "oneOf")): several}


def grammar_of(schema: object) -> str:
    return f"start: {json_form.json_rule(schema)}"


def walked(grammar: str, runner: Any, chance: random.Random, steps: int = STEPS) -> str:
    """Why an answer by a proven `grammar` fails, if it does, at one of so many random tokens.

    AssertionError where it takes more than it may.
    """
    logits, before = torch.zeros(runner.vocabulary), resident()
    begun = time.thread_time()
    try:
        form = json_form.compiled(grammar, runner)
        taken = time.thread_time() - begun
        assert taken < MOST_COMPILING, f"{taken} s to compile"
        for _ in range(steps):
            begun = time.thread_time()
            tokens = form.allowed(logits).isfinite().nonzero()[:, 0].tolist()
            goes_on = [each for each in tokens if each not in runner.ends]
            is_whole = not goes_on or form.add(chance.choice(goes_on))
            taken = time.thread_time() - begun
            assert taken < MOST_STEP, f"{taken} s for a token"
            if is_whole:
                break
    except EngineError as error:
        return str(error)
    finally:
        grown = resident() - before
        assert grown < MOST_BYTES, f"{grown} bytes"
    return ""


def tried(seed: int, runner: Any, limits: json_form.Limits = LIMITS) -> str:
    """Whether the schema of this number was refused, compiled, or ended an answer later."""
    chance = random.Random(seed)
    asked = {**schema(chance), "$defs": {"a": schema(chance, 2)}}
    if json_form.proven(grammar_of(asked), 60, limits).why:
        return "refused"
    try:
        return "ended" if walked(grammar_of(asked), runner, chance) else "compiled"
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}: {json.dumps(asked)[:2000]}") from error


def runner_of(tokenizer: Any) -> Any:
    """What of a model a form needs."""
    ends = frozenset([tokenizer.eos_token_id])
    return SimpleNamespace(tokenizer=tokenizer, vocabulary=len(tokenizer), ends=ends)


def main() -> None:
    runner = runner_of(AutoTokenizer.from_pretrained(smollm2_folder()))
    seed, until = int((sys.argv[2:] or [0])[0]), time.monotonic() + float(sys.argv[1])
    counts = Counter[str]()
    while time.monotonic() < until:
        counts[tried(seed, runner)] += 1
        seed += 1
    sys.stdout.write(f"{dict(counts)}\n")


if __name__ == "__main__":
    main()
