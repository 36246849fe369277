"""Sequences and batches of tiny models, for tests of the server's engine."""

import threading

import torch

import serving  # noqa: F401  skips without the extra
from phatgoose.apps.server.local.batches import ActiveSequence, Batch
from phatgoose.apps.server.protocol import ApiError
from phatgoose.apps.server.requests import Answer, Decoding, RequestPrompt
from tiny import make_ids, make_tokenizer

GREEDY = Decoding(max_tokens=12, temperature=0.0)


class Told:
    """What rows were told."""

    def __init__(self):
        self.events = []
        self.over = threading.Event()

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

    @property
    def routing(self):
        return [stream for event in self.events for stream in event.routing]


def row_of(runner, prompt, decoding=GREEDY, choice=0, client="", turn=None):
    answer = Answer(choice, 0, RequestPrompt(tuple(prompt), "", ()), decoding)
    return ActiveSequence(runner, answer, Told(), client, turn)


def prompt_of(seed, tokens=None):
    return make_ids(1, tokens or 3 + 5 * seed, seed)[0].tolist()


def finish(batch):
    while batch.sequences:
        batch.step()


def alone(runner, prompt, decoding=GREEDY):
    row, batch = row_of(runner, prompt, decoding), Batch(runner)
    batch.join([row])
    finish(batch)
    return row


def by_generate(runner, prompt, tokens):
    key = (runner, tuple(prompt))
    if len(GENERATED.get(key, ())) < tokens:
        GENERATED[key] = runner.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max(tokens, 12),
            do_sample=False,
            eos_token_id=None,
        )[0].tolist()[len(prompt) :]
    return GENERATED[key][:tokens]


GENERATED = {}


TOKENIZER = make_tokenizer(final_eos=False)


def raises(error):
    def fail(*_, **__):
        raise error

    return fail
