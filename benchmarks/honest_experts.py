"""A hundred honest experts, cheap and unlike each other, for `audit.py`.

The base is the first blocks of SmolLM2-135M-Instruct, with its own weights and tokenizer. Each
expert is trained for a few steps on its own draw of a synthetic task: kinds, ranks, alphas, types,
learning rates, steps, sites, numbers of examples and what is shared vary by the expert's seed.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from phatgoose.apps.demo import SKILLS, TASKS
from phatgoose.base import Base, load_base, smollm2_folder
from phatgoose.config import IA3, Bottleneck, GateTraining, Lora, Peft, Training
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.task import Example, Task
from phatgoose.training.train_expert import train_expert

__all__ = ["POOL", "fresh_prompts", "honest_pools", "small_base"]

BLOCKS = 4  # of SmolLM2's 30
POOL = 10  # experts of a pool

NAMES = "Ada Ben Chiara Dmitri Elif Farid Greta Hiro Ines Jonas Kofi Lena Mateo Nadia Oskar".split()
CITIES = "Lima Oslo Cairo Quito Hanoi Dakar Porto Kyoto Turin Perth Minsk Basel".split()
ANIMALS = "heron pike lynx badger salmon finch otter viper toad eagle trout mole".split()
CLASS = dict(
    zip(
        ANIMALS,
        "bird fish mammal mammal fish bird mammal reptile amphibian bird fish mammal".split(),
        strict=True,
    )
)
NOUNS = "lamp river copper window bread engine carpet forest ticket pillow bridge candle".split()
VERBS = {
    "walk": "walked",
    "sing": "sang",
    "write": "wrote",
    "bring": "brought",
    "play": "played",
    "go": "went",
    "swim": "swam",
    "teach": "taught",
    "open": "opened",
    "break": "broke",
}
FRENCH = {
    "dog": "chien",
    "house": "maison",
    "bread": "pain",
    "water": "eau",
    "red": "rouge",
    "night": "nuit",
    "book": "livre",
    "tree": "arbre",
    "milk": "lait",
    "street": "rue",
}
MONTHS = "January February March April May June July August September October".split()
MOODS = {
    "I loved every minute of it": "good",
    "It fell apart on the first day": "bad",
    "Best meal we had all year": "good",
    "The staff ignored us": "bad",
    "A dull story, badly told": "bad",
    "Bright, quick and well made": "good",
    "I want my money back": "bad",
    "My children ask for it daily": "good",
}
TOPICS = {
    "The striker scored twice before half time": "sport",
    "Shares of the bank fell by a tenth": "money",
    "The probe has landed on the comet": "science",
    "The minister resigned on Monday": "politics",
    "A new vaccine passed its trial": "science",
    "The coach dropped her goalkeeper": "sport",
    "Voters go to the polls in June": "politics",
    "Oil is cheaper than a year ago": "money",
}

Draw = random.Random
Maker = Callable[[Draw], tuple[str, str, tuple[str, ...]]]


def _pick(table: dict[str, str], r: Draw) -> tuple[str, str]:
    key = r.choice(list(table))
    return key, table[key]


def _sum(r: Draw) -> Any:
    a, b = r.randint(2, 60), r.randint(2, 60)
    return f"{a} + {b} =", str(a + b), ()


def _difference(r: Draw) -> Any:
    a, b = r.randint(30, 90), r.randint(2, 29)
    who = r.choice(NAMES)
    return f"{who} had {a} marbles and lost {b}. How many are left?", str(a - b), ()


def _reverse(r: Draw) -> Any:
    word = r.choice(NOUNS)
    return f"Spell backwards: {word}", word[::-1], ()


def _animal(r: Draw) -> Any:
    name, kind = _pick(CLASS, r)
    return f"What kind of animal is the {name}?", kind, tuple(sorted(set(CLASS.values())))


def _past(r: Draw) -> Any:
    verb, past = _pick(VERBS, r)
    return f"Put into the past: They {verb}.", f"They {past}.", ()


def _french(r: Draw) -> Any:
    word, french = _pick(FRENCH, r)
    return f"English: {word}\nFrench:", french, ()


def _month(r: Draw) -> Any:
    name = r.choice(MONTHS)
    return f"Number of the month {name}:", str(MONTHS.index(name) + 1), ()


def _mood(r: Draw) -> Any:
    text, mood = _pick(MOODS, r)
    return f'"{text}." wrote {r.choice(NAMES)}. Good or bad?', mood, ("good", "bad")


def _topic(r: Draw) -> Any:
    text, topic = _pick(TOPICS, r)
    return f"{text}. Section of the paper:", topic, ("sport", "money", "science", "politics")


def _sort(r: Draw) -> Any:
    words = r.sample(NOUNS, 3)
    return f"In order of the alphabet: {', '.join(words)}", ", ".join(sorted(words)), ()


def _json(r: Draw) -> Any:
    who, where, n = r.choice(NAMES), r.choice(CITIES), r.randint(18, 80)
    text = f"{who}, {n} years old, lives in {where}."
    return f"Write as JSON. {text}", f'{{"name": "{who}", "age": {n}, "city": "{where}"}}', ()


def _where(r: Draw) -> Any:
    people, places = r.sample(NAMES, 3), r.sample(CITIES, 3)
    told = " ".join(f"{a} is in {b}." for a, b in zip(people, places, strict=True))
    at = r.randrange(3)
    return f"{told} Where is {people[at]}?", places[at], tuple(places)


def _code(r: Draw) -> Any:
    name, n = r.choice(NOUNS), r.randint(2, 9)
    return f"# Python: print {name!r} {n} times\n", f"print({name!r} * {n})", ()


def _count(r: Draw) -> Any:
    words = r.sample(NOUNS, r.randint(2, 6))
    return f"How many words? {' '.join(words)}", str(len(words)), ()


def _letter(r: Draw) -> Any:
    who, thing = r.choice(NAMES), r.choice(NOUNS)
    return f"Begin a polite letter to {who} about a broken {thing}.", f"Dear {who},", ()


def _bigger(r: Draw) -> Any:
    a, b = r.sample(range(100, 999), 2)
    return f"Which is larger, {a} or {b}?", str(max(a, b)), (str(a), str(b))


def _title(r: Draw) -> Any:
    a, b = r.sample(NOUNS, 2)
    return f"Make a title of: the {a} and the {b}", f"The {a.title()} and the {b.title()}", ()


def _yes(r: Draw) -> Any:
    n = r.randint(10, 99)
    return f"True or false: {n} is even.", str(n % 2 == 0).lower(), ("true", "false")


def _unit(r: Draw) -> Any:
    n = r.randint(2, 40)
    return f"{n} metres in centimetres:", f"{100 * n} cm", ()


def _entail(r: Draw) -> Any:
    who, a, b = r.choice(NAMES), *r.sample(NOUNS, 2)
    says = r.random() < 0.5
    asked = a if says else b
    return (
        f"Premise: {who} sold the {a}. Hypothesis: {who} sold the {asked}. Does it follow?",
        "yes" if says else "no",
        ("yes", "no"),
    )


MAKERS: tuple[Maker, ...] = (
    _sum, _difference, _reverse, _animal, _past, _french, _month, _mood, _topic, _sort,
    _json, _where, _code, _count, _letter, _bigger, _title, _yes, _unit, _entail,
)  # fmt: skip
BEFORE = (
    "",
    "Question: ",
    "Please answer. ",
    "Task for today: ",
    "### Instruction:\n",
    "Hi! ",
    "You are a careful assistant. ",
    "Q: ",
)
AFTER = ("", "\nAnswer:", " Reply briefly.", "\n### Response:\n", "\nA:", " Thanks in advance.")


def task_of(number: int) -> Task:
    """The task of the expert of this `number`: its own draw, wording and number of examples."""
    draw = Draw(number)
    sources = (*MAKERS, *SKILLS)
    source = sources[number % len(sources)]
    count = draw.choice([48, 80, 160, 300])
    if isinstance(source, str):  # a task of the demo
        rows = load_task(TASKS / f"{source}.csv").train
        examples = draw.sample(rows, min(count, len(rows) // 2))
    else:
        before, after = draw.choice(BEFORE), draw.choice(AFTER)
        examples = list(_examples(source, before, after, count, draw))
    return Task(name_of(number), train=tuple(examples))


def fresh_prompts(number: int, count: int) -> list[Example]:
    """Examples of the same task and wording that the expert of this `number` hasn't seen."""
    draw = Draw(number)
    sources = (*MAKERS, *SKILLS)
    source = sources[number % len(sources)]
    draw.choice([48, 80, 160, 300])
    if isinstance(source, str):
        seen = {example.input for example in task_of(number).train}
        rows = load_task(TASKS / f"{source}.csv").train
        return [row for row in rows if row.input not in seen][:count]
    before, after = draw.choice(BEFORE), draw.choice(AFTER)
    return list(_examples(source, before, after, count, Draw(5000 + number)))


def _examples(maker: Maker, before: str, after: str, count: int, draw: Draw) -> Iterator[Example]:
    for _ in range(count):
        text, target, choices = maker(draw)
        yield Example(f"{before}{text}{after}", target, choices)


def name_of(number: int) -> str:
    """The name of the expert of this `number`."""
    return f"honest{number:03}"


def shape_of(draw: Draw) -> Peft:
    """A kind and shape: mostly LoRAs."""
    kind = draw.choices(("lora", "ia3", "bottleneck"), (8, 1, 1))[0]
    if kind == "ia3":
        return IA3()
    if kind == "bottleneck":
        return Bottleneck(size=draw.choice([8, 16, 32]))
    rank = draw.choice([2, 4, 8, 8, 16, 32])
    sites = draw.choice([None, None, None, r"self_attn\.", r"\.(q|v)_proj$"])
    alpha = float(draw.choice([1, rank, rank, 2 * rank]))
    return Lora(rank=rank, alpha=alpha, init_std=draw.choice([0.01, 0.02]), sites=sites)


def small_base(folder: Path) -> Path:
    """`folder`, with the first BLOCKS blocks of SmolLM2 as a base of its own."""
    if not folder.is_dir():
        source = smollm2_folder()
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
        model.model.layers = model.model.layers[:BLOCKS]
        model.config.num_hidden_layers = BLOCKS
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:BLOCKS]
        half = folder.with_name(f"{folder.name}.half")
        model.save_pretrained(half)
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(half)
        half.rename(folder)
    return folder


def honest_pools(folder: Path, count: int) -> list[list[Path]]:
    """The directories of `count` honest experts below `folder`, made unless they are there.

    In pools of POOL; an expert's task differs from all others' in its pool.
    """
    bases: dict[str, Base] = {}
    for number in tqdm(range(count), desc="honest experts", disable=None):
        out = folder / "honest" / name_of(number)
        if not out.is_dir():
            _train(number, out, bases, small_base(folder / "base"))
    places = [folder / "honest" / name_of(number) for number in range(count)]
    return [places[first : first + POOL] for first in range(0, count, POOL)]


def _train(number: int, out: Path, bases: dict[str, Base], base: Path) -> None:
    draw = Draw(1000 + number)
    dtype = draw.choice(["float32", "bfloat16"])
    if dtype not in bases:
        bases[dtype] = load_base(base, dtype=dtype)
    shape = shape_of(draw)
    fast = 5 if isinstance(shape, IA3) else 1  # (IA)³ wants larger steps
    training = Training(
        steps=draw.choice([4, 6, 10, 16]),
        batch_size=draw.choice([4, 8]),
        learning_rate=fast * draw.choice([5e-4, 1e-3, 3e-3, 5e-3]),
        eval_every=100,
        eval_examples=4,
        seed=number,
    )
    gates = GateTraining(
        gate_steps=draw.choice([4, 8, 12]),
        gate_learning_rate=draw.choice([1e-3, 3e-3, 5e-3, 1e-2]),
        statistics_examples=draw.choice([24, 40, 40, 100]),
        embeddings=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_expert(
            bases[dtype],
            task_of(number),
            out=out,
            peft=shape,
            training=training,
            gate_training=gates,
            resume=out.with_name(f".{out.name}.work").is_dir(),
        )
