"""Small tasks to analyse, and examples whose routing is summed up."""

import phatgoose as pg
from phatgoose.analysis.distribution import read_task
from phatgoose.routing.compose import composition_of
from phatgoose.tasks.encoding import Encoder
from phatgoose.tasks.task import Example, Task


def task(name, count=6):
    rows = [
        {"input": f"{name} {i} is", "target": ("good", "bad")[i % 2], "choices": ["good", "bad"]}
        for i in range(count)
    ]
    return pg.load_task(rows, name=name)


TASKS = [task("first"), task("second")]


def encoder_of(base):
    return Encoder(base.tokenizer, is_encoder_decoder=base.is_encoder_decoder)


def example(number):
    return Example(f"Film {number} {'very ' * number}is", ("good", "bad indeed")[number % 2])


EXAMPLES = [example(number) for number in range(5)]


def tallied(model, base, examples=EXAMPLES, budget=4096, experts=()):
    experts = experts or composition_of(model).experts
    task = Task("second", test=tuple(examples))
    return read_task(model, encoder_of(base), task, experts, budget)[0]
