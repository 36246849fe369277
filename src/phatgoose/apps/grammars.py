"""The process that proves a grammar, which is a client's, to be compiled within limits.

llguidance compiles some schemas of a hundred bytes without end, and a thread can't be ended. What
it does afterwards, a token at a time, it limits itself. A compiled grammar can't be sent on, so
who asks compiles it once more.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ..untrusted_text import limit_memory, limit_seconds, resident

NICENESS = 10  # answers go first: it gets a tenth of a core that they want
# Of the lexer, as it meets new texts: some patterns want more states than there is memory. Large
# expressions wait for their text too, since how long they take now depends on the vocabulary.
LIMITS: dict[str, Any] = {
    "max_lexer_states": 20_000,  # 400 bytes each
    "step_lexer_fuel": 100_000,  # ten milliseconds
    "precompute_large_lexemes": False,
}


def main() -> None:
    """Answer one question: what is wrong with a grammar, if anything, and the bytes it needs."""
    if sys.platform != "win32":
        os.nice(NICENESS)
    grammar, memory, seconds = json.loads(sys.stdin.readline())
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    tokenizer = LLTokenizer("byte")  # compiling needs no vocabulary
    limit_memory(memory)
    limit_seconds(seconds)
    before = resident()
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    error = matcher.get_error().partition("\n")[0].rstrip(".")
    sys.stdout.write(json.dumps({"error": error, "bytes": resident() - before}) + "\n")
