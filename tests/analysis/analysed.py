"""Small tasks to analyse, and examples whose routing is summed up."""

import torch

import phatgoose as pg


def task(name, count=6):
    rows = [
        {"input": f"{name} {i} is", "target": ("good", "bad")[i % 2], "choices": ["good", "bad"]}
        for i in range(count)
    ]
    return pg.load_task(rows, name=name)


TASKS = [task("first"), task("second")]


def pass_alone(model, pair):
    """One pass over a prompt and its answer, without padding; 0 for prompt, 1 for answer."""
    prompt, answer = pair.prompt, pair.target[:-1]
    inputs = {"input_ids": torch.tensor([prompt + answer])}
    parts = {"decoder": [0] * len(prompt) + [1] * len(answer)}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": torch.tensor([prompt])}
        inputs["decoder_input_ids"] = torch.tensor([[0, *answer]])
        parts = {"encoder": [0] * len(prompt), "decoder": [1] * (len(answer) + 1)}
    with torch.no_grad():
        model(**inputs)
    return parts
