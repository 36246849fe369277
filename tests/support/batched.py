"""Sequences and batches of tiny models, for tests of the server's engine."""

import threading

import torch

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server.local.batches import ActiveSequence, Batch
from phatgoose.apps.server.protocol import ApiError
from phatgoose.apps.server.requests import Answer, Decoding, RequestPrompt
from tiny import make_ids, make_tokenizer

GREEDY = Decoding(max_tokens=12, temperature=0.0)
TOKENIZER = make_tokenizer(final_eos=False)


class Told:
    """What rows were told."""

    def __init__(self):
        self.events, self.over = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, ApiError) or event.finish:
            self.over.set()

    @property
    def text(self):
        return "".join(event.text for event in self.events)

    @property
    def tokens(self):
        return [token for event in self.events for token in event.tokens]


def row_of(runner, prompt, decoding=GREEDY, client="", turn=None):
    answer = Answer(0, 0, RequestPrompt(tuple(prompt), "", ()), decoding)
    return ActiveSequence(runner, answer, Told(), client, turn)


def prompt_of(seed, tokens=None):
    return make_ids(1, tokens or 3 + 5 * seed, seed)[0].tolist()


def finished(runner, rows, store=None):
    """The rows, computed in one batch."""
    batch = Batch(runner, store)
    batch.join(rows)
    while batch.sequences:
        batch.step()
    return rows


def by_generate(runner, prompt, tokens=12):
    """What the model itself generates."""
    composition = getattr(runner.model, "phatgoose", None)
    if composition and composition.context:
        composition.context.use(None)
    return runner.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
    )[0].tolist()[len(prompt) :]
