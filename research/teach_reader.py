"""Teach a reader what a prompt asks for, whatever its manner: a LoRA on its first blocks.

    python research/teach_reader.py gemma OUT --last 9 --steps 300 [--seed 0]

The texts are our own (research/reader/): skills with prompts in many languages, general requests,
wrappers, pastes, frames. None of their skills is in benchmarks/people. A step takes two prompts of
each of some skills, each in a manner of its own; the loss asks that a prompt's state be nearest to
the other one's (InfoNCE). General requests are pairs of the same text in two manners, helpers,
frames, politeness and neutral texts are classes. A checkpoint every --keep steps goes to
OUT/STEP as PEFT saves it, with the optimiser, so that an interrupted run goes on. Which of them is
the reader is decided by hand 2: python benchmarks/people.py --readers gemma:5-9+OUT/300.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from people_cases import filled, misspelt
from people_readers import Reader, block_outputs
from phatgoose.tasks.batching import pad_right

TEXTS = Path(__file__).parent / "reader"
SKILLS_A_STEP = 24
GENERAL_A_STEP = 4  # pairs of a general text in two manners
GENERAL_APART = 3  # pairs of two general texts, which are made alike
MOST_TOKENS = 128
TEMPERATURE = 0.1
WARM_UP = 10
RANK = 16
# How often a prompt comes in which manner.
MANNERS: Mapping[str, float] = {
    "plain": 0.3,
    "light": 0.1,
    "medium": 0.1,
    "heavy": 0.1,
    "typos": 0.08,
    "lower": 0.04,
    "upper": 0.06,
    "short": 0.1,
    "code": 0.05,
    "frame": 0.05,
    "corrections": 0.02,
}
GENERAL = "general"
CLASSES = ("helper", "frame", "politeness", "neutral")


class Row(NamedTuple):
    """A text, and the label of what it asks for."""

    text: str
    label: str


@dataclass(frozen=True)
class Texts:
    """What is taught: prompts of each skill, and what stands around them (research/reader/)."""

    skills: Mapping[str, Sequence[str]]
    parts: Mapping[str, Sequence[str]]
    manners: Mapping[str, float] = field(default_factory=lambda: MANNERS)

    @classmethod
    def load(cls) -> Texts:
        words = tomllib.loads((TEXTS / "words.toml").read_text(encoding="utf-8"))
        skills = dict[str, list[str]]()
        parts = dict[str, list[str]]()
        for path in sorted(TEXTS.glob("[!w]*.toml")):
            content = tomllib.loads(path.read_text(encoding="utf-8"))
            if not path.stem.startswith("skills-"):
                parts |= content
                continue
            for name, skill in content.items():
                owner = f"{path.stem}/{name}"
                skills[owner] = [*skill["prompts"], *skill["other"].values(), *words[owner]]
        return cls(skills, parts)

    def some(self, count: int, rng: random.Random) -> Texts:
        """`count` of the skills."""
        kept = rng.sample(list(self.skills), count)
        return replace(self, skills={name: self.skills[name] for name in kept})

    def in_manner(self, prompt: str, rng: random.Random) -> str:
        """`prompt` in a manner that is drawn."""
        kind = rng.choices(list(self.manners), list(self.manners.values()))[0]
        if kind == "plain":
            return prompt
        if kind == "typos":
            return misspelt(prompt, rng.uniform(0.02, 0.08), rng)
        if kind == "lower":
            return prompt.lower()
        if kind == "upper":
            return prompt.upper()
        if kind in ("short", "code"):
            saying = rng.choice(self.parts["sayings"])
            return filled(saying, request=prompt, paste=rng.choice(self.parts[kind]))
        template = rng.choice(self.parts[kind])
        return filled(template, request=prompt, context=rng.choice(self.parts["short"]))

    def of_class(self, name: str, rng: random.Random) -> str:
        """A text of one of CLASSES."""
        if name == "neutral":
            return rng.choice([*self.parts["neutral"], *self.parts["short"]])
        if name == "politeness":
            kind = rng.choice(("light", "medium", "heavy"))
            return filled(rng.choice(self.parts[kind]), request="").strip()
        template = rng.choice(self.parts[name])
        if name == "frame":
            return filled(template, request="", context=rng.choice(self.parts["short"])).strip()
        prompt = rng.choice(self.skills[rng.choice(list(self.skills))])
        return filled(template, chat=f"USER: {prompt}\nASSISTANT: Here you are.")

    def batch(self, rng: random.Random) -> list[Row]:
        """The rows of a step: each label twice, one after the other."""
        rows = list[Row]()
        for skill in rng.sample(list(self.skills), min(SKILLS_A_STEP, len(self.skills))):
            for prompt in rng.sample(self.skills[skill], 2):
                rows.append(Row(self.in_manner(prompt, rng), skill))
        general = self.parts[GENERAL]
        for text in rng.sample(general, GENERAL_A_STEP):
            rows += [Row(self.in_manner(text, rng), f"{GENERAL}/{text}") for _ in range(2)]
        for text in rng.sample(general, 2 * GENERAL_APART):
            rows.append(Row(self.in_manner(text, rng), GENERAL))
        for name in CLASSES:
            rows += [Row(self.of_class(name, rng), name) for _ in range(2)]
        return rows


def loss_of(states: Tensor, labels: Sequence[str]) -> Tensor:
    """InfoNCE over `states` [rows, blocks, d], standardised; row 2i's other half is row 2i + 1.

    Two general requests of different labels are neither alike nor unlike.
    """
    count = len(labels)
    of_general = torch.tensor([label.startswith(GENERAL) for label in labels])
    ignored = (of_general[:, None] & of_general) | torch.eye(count, dtype=torch.bool)
    partner = torch.arange(count) ^ 1
    ignored[torch.arange(count), partner] = False
    losses = []
    for block in states.unbind(dim=1):
        unit = normalize(block, dim=1)
        scores = (unit @ unit.T / TEMPERATURE).masked_fill(ignored, -torch.inf)
        losses.append(cross_entropy(scores, partner))
    return torch.stack(losses).sum()


class Pupil:
    """A reader's model under a LoRA, and the states of some of its blocks."""

    def __init__(self, reader: Reader, taught: Sequence[int], adapter: Path | None) -> None:
        _, stack, _ = reader.loaded
        self.tokens = reader.tokens
        self.taught = taught
        stack.float()
        if reader.place == "e5":
            blocks: Sequence[nn.Module] = stack.blocks
            names = ["q", "v", "ao", "fi", "fo"]
        elif reader.is_bert:
            blocks = stack.encoder.layer
            names = ["query", "value", "dense"]
        else:
            blocks = stack.layers
            names = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
        if adapter:
            self.model = PeftModel.from_pretrained(stack, adapter, is_trainable=True)
        else:
            self.model = get_peft_model(stack, config)
        self.blocks = [blocks[number] for number in taught]

    def states(self, texts: Sequence[str]) -> Tensor:
        """The means over tokens of what the blocks make of `texts`, [texts, 2, d]."""
        tokens = self.tokens(texts, MOST_TOKENS)
        ids = pad_right(tokens, 0)
        mask = pad_right([[1] * len(row) for row in tokens], 0)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = block_outputs(self.model, self.blocks, input_ids=ids, attention_mask=mask)
        real = mask[..., None].float()
        sums = [(output.float() * real).sum(dim=1) / real.sum(dim=1) for output in outputs]
        return torch.stack(sums, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("reader", help="e5, minilm, smollm2, gemma or qwen")
    parser.add_argument("out", type=Path)
    parser.add_argument("--last", type=int, required=True, help="the last block, from 0")
    parser.add_argument("--read", type=int, default=2, help="blocks of the loss, every other one")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--keep", type=int, default=50)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skills", type=int, help="this many of them, drawn by the seed")
    parser.add_argument("--plain", action="store_true", help="prompts as they are, in no manner")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    texts = Texts.load()
    if given.skills:
        texts = texts.some(given.skills, random.Random(given.seed))
    if given.plain:
        texts = replace(texts, manners={"plain": 1.0})
    taught = tuple(range(given.last - 2 * (given.read - 1), given.last + 1, 2))
    kept = sorted((int(path.name) for path in given.out.glob("[0-9]*")), reverse=True)
    done = kept[0] if kept else 0
    reader = Reader.of(f"{given.reader}:{taught[0]}-{given.last}")
    pupil = Pupil(reader, taught, given.out / str(done) if done else None)
    weights = [weight for weight in pupil.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=given.rate)
    print(f"{len(texts.skills)} skills, {sum(w.numel() for w in weights)} weights", flush=True)

    def rate(step: int) -> float:
        return min((step + 1) / WARM_UP, 1 - step / given.steps)

    with torch.no_grad(), pupil.model.disable_adapter():
        rng = random.Random(given.seed)
        sample = [prompt for prompts in texts.skills.values() for prompt in rng.sample(prompts, 2)]
        parts = [pupil.states(sample[at : at + 16]) for at in range(0, len(sample), 16)]
        mean = torch.cat(parts).mean(dim=0)
        deviation = torch.cat(parts).std(dim=0)
    if done:
        optimizer.load_state_dict(
            torch.load(given.out / str(done) / "optimizer.pt", weights_only=True)
        )
    begun = time.monotonic()
    losses = list[float]()
    for step in range(done, given.steps):
        rows = texts.batch(random.Random(f"{given.seed}/{step}"))
        for group in optimizer.param_groups:
            group["lr"] = given.rate * rate(step)
        states = pupil.states([row.text for row in rows])
        loss = loss_of((states - mean) / deviation, [row.label for row in rows])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 10 == 9:
            seconds = (time.monotonic() - begun) / (step + 1 - done)
            loss_now = round(fmean(losses[-10:]), 3)
            line = {"step": step + 1, "loss": loss_now, "s": round(seconds, 2)}
            print(json.dumps(line), flush=True)
        if (step + 1) % given.keep == 0:
            folder = given.out / str(step + 1)
            pupil.model.save_pretrained(folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")


if __name__ == "__main__":
    main()
