"""Neutral text: the same passages for everybody."""

import hashlib

from phatgoose.tasks.neutral import PASSAGES, neutral_examples

DIGEST = "9fddd28e22dd9762326201a8e8152024ec5a354d4cfec972764b8aa09a797652"


def test_the_passages_never_change():
    assert hashlib.sha256(PASSAGES.read_bytes()).hexdigest() == DIGEST
    examples = neutral_examples()
    assert len(examples) == 40
    for passage, example in zip(PASSAGES.read_text().strip().split("\n\n"), examples, strict=True):
        assert (example.input + example.target).split() == passage.split() or (
            f"{example.input} {example.target}".split() == passage.split()
        )
        assert example.input
        assert example.target
