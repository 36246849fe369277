"""Tasks to be scored, and their scores and answers one example at a time."""

import torch

from phatgoose.tasks.task import Example, Task
from tiny import logits_of

CHOICE_TASK = Task(
    "choose",
    test=(
        Example("is it?", "yes", ("yes", "no")),
        Example("which of the three letters is it", "b", ("a", "b", "c")),
        Example("one", "certainly not", ("certainly not", "perhaps", "no", "y")),
        Example("ends in space ", "maybe", ("maybe", "mayhem")),
        Example("a far longer input that makes other rows need padding", "no", ("no", "nope")),
    ),
)


def naive_scores(model, base, example: Example) -> list[float]:
    """The mean log-likelihood per target token, </s> included: one whole pass per choice."""
    scores = []
    prompt = base.tokenizer(example.input)["input_ids"]
    for choice in example.choices:
        if base.is_encoder_decoder:
            target = [*base.tokenizer(choice, add_special_tokens=False)["input_ids"], 1]
            decoded = torch.tensor([[0, *target[:-1]]])
            logits = logits_of(model, torch.tensor([prompt]), decoder_input_ids=decoded)[0]
        else:
            space = "" if example.input.endswith(" ") else " "
            target = [*base.tokenizer(space + choice)["input_ids"], 1]
            logits = logits_of(model, torch.tensor([prompt + target]))[0, len(prompt) - 1 : -1]
        rows = logits.log_softmax(dim=-1)
        scores.append(sum(rows[t, token].item() for t, token in enumerate(target)) / len(target))
    return scores


def greedy_text(model, base, text: str, tokens: int) -> str:
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )[0]
    start = 0 if base.is_encoder_decoder else ids.shape[1]
    return base.tokenizer.decode(output[start:], skip_special_tokens=True).strip()
