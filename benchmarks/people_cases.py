"""The chats of benchmarks/people.py: what a hand wrote, in each of the manners (people/README.md).

Every case is drawn by a seed of its own, so that another manner or prompt changes no other case.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

TEXTS = Path(__file__).parent / "people"
SEED = 0
LANGUAGES = ("de", "fr", "es", "pt", "pl", "ja")
POLITE = ("light", "medium", "heavy")
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
WORD = re.compile(r"[^\W\d_]+")
BLANK_LINE = re.compile(r"\n\s*\n")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
Turns = tuple[tuple[str, str], ...]  # (role, content)


class Case(NamedTuple):
    """A chat in a `manner`, and the skills of which any is right; none: the base.

    `owner` is what intervals are over: the skill whose prompt is in it, else the text itself.
    """

    manner: str
    turns: Turns
    wanted: frozenset[str]
    owner: str


@dataclass(frozen=True)
class Hand:
    """What one hand wrote: of each skill, of `others` that only fill up pools, and the rest."""

    skills: Mapping[str, Mapping[str, Any]]
    others: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, Any]


def load_hand(number: int) -> Hand:
    """Hand `number`, 1 to 3. Files that it lacks are left out."""
    parts: dict[str, dict[str, Any]] = {"prompts": {}, "others": {}, "texts": {}}
    for path in sorted((TEXTS / f"hand{number}").glob("*.toml")):
        kind = path.stem.partition("-")[0]
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        parts.get(kind, parts["texts"]).update(content)
    return Hand(parts["prompts"], parts["others"], parts["texts"])


@dataclass(frozen=True)
class Draw:
    """A prompt of a skill, and the chance by which a case is made of it."""

    hand: Hand
    skill: str
    prompt: str
    rng: random.Random

    def text(self, kind: str) -> str:
        return str(self.rng.choice(self.hand.texts[kind]))

    def prompt_of_another(self) -> tuple[str, str]:
        """(skill, prompt) of another skill."""
        name = self.rng.choice([each for each in self.hand.skills if each != self.skill])
        return name, self.rng.choice(self.hand.skills[name]["prompts"])


Made = str | Turns  # the one turn of a user, or a chat
Make = Callable[[Draw], Made]


class Manner(NamedTuple):
    """How chats are made of the skills' prompts; `needs` names the texts without which none is."""

    make: Make
    needs: tuple[str, ...] = ()
    most: int | None = None  # cases a skill
    is_own: bool = True  # whether the skill's expert should answer


def filled(template: str, **parts: str) -> str:
    """`template` with each {name} replaced; other braces, and those of the parts, are text."""
    return re.sub(rf"\{{({'|'.join(parts)})\}}", lambda found: parts[found[1]], template)


def polite(draw: Draw, kind: str) -> str:
    return filled(draw.text(kind), request=draw.prompt)


def misspelt(text: str, share: float, rng: random.Random) -> str:
    """`text` with typos at a `share` of its letters, inside words: none vanishes or is joined."""
    return WORD.sub(lambda word: _misspelt_word(word[0], share, rng), text)


def _misspelt_word(word: str, share: float, rng: random.Random) -> str:
    typed, rest = "", word
    while rest:
        letter, rest = rest[0], rest[1:]
        kind = rng.choice(("swap", "drop", "double", "neighbour")) if rng.random() < share else ""
        if kind == "swap" and rest:
            typed, rest = typed + rest[0] + letter, rest[1:]
        elif kind == "double":
            typed += 2 * letter
        elif kind == "drop" and (typed or rest):
            pass
        else:
            typed += _beside(letter, rng) if kind else letter
    return typed


def _beside(letter: str, rng: random.Random) -> str:
    """A key beside the letter's; the letter itself if it is on none of them."""
    for row in KEYS:
        place = row.find(letter.lower())
        if place >= 0:
            key = rng.choice(row[max(place - 1, 0) : place] + row[place + 1 : place + 2])
            return key.upper() if letter.isupper() else key
    return letter


def corrected(draw: Draw) -> Turns:
    """The request, an answer, and the request again in a correction."""
    again = filled(draw.text("corrections"), request=draw.prompt)
    return ("user", draw.prompt), ("assistant", "Here you are."), ("user", again)


def pasted(draw: Draw, kind: str, is_before: bool, is_apart: bool) -> str | None:
    """The request before or after a paste, in a paragraph of its own or not; None: not so said."""
    sayings = [saying for saying in draw.hand.texts["sayings"] if _is(saying, is_before, is_apart)]
    if not sayings:
        return None
    return filled(draw.rng.choice(sayings), request=draw.prompt, paste=draw.text(kind))


def _is(saying: str, is_before: bool, is_apart: bool) -> bool:
    paragraphs = BLANK_LINE.split(saying)
    mixed = any("{request}" in each and "{paste}" in each for each in paragraphs)
    starts = saying.index("{request}") < saying.index("{paste}")
    return starts == is_before and mixed != is_apart


def in_the_middle(draw: Draw, kind: str) -> str:
    """The request on a line of its own between the halves of a paste without blank lines."""
    sentences = SENTENCE_END.split(BLANK_LINE.sub("\n", draw.text(kind)))
    half = len(sentences) // 2
    return "\n".join((" ".join(sentences[:half]), draw.prompt, " ".join(sentences[half:])))


def beside_code(draw: Draw) -> str:
    return filled(draw.text("sayings"), request=draw.prompt, paste=draw.text("code"))


def helped(draw: Draw) -> str:
    """What a chat interface asks in the background, of a chat about the request."""
    helper = draw.rng.choice(draw.hand.texts["helper"])
    chat = f"USER: {draw.prompt}\nASSISTANT: Here you are."
    return filled(helper["text"], chat=chat)


def framed(draw: Draw) -> str:
    frame = draw.rng.choice(draw.hand.texts["frame"])
    return filled(frame["text"], request=draw.prompt, context=draw.text("contexts"))


def _pastes() -> Iterator[tuple[str, Manner]]:
    for words, kind, most in (("50", "short", None), ("400", "middle", 1)):
        for is_before in (True, False):
            for is_apart in (True, False):
                side = "before" if is_before else "after"
                gap = "blank line" if is_apart else "line break"
                make = partial(pasted, kind=kind, is_before=is_before, is_apart=is_apart)
                name = f"{side} {words} words, {gap}"
                yield name, Manner(make, ("sayings", kind), most)  # type: ignore[arg-type]


def _any_side(draw: Draw) -> str:
    return filled(draw.text("sayings"), request=draw.prompt, paste=draw.text("long"))


OF_SKILLS: dict[str, Manner] = {
    "plain": Manner(lambda d: d.prompt),
    **{kind: Manner(partial(polite, kind=kind), (kind,)) for kind in POLITE},
    "typos 3 %": Manner(lambda d: misspelt(d.prompt, 0.03, d.rng)),
    "typos 7 %": Manner(lambda d: misspelt(d.prompt, 0.07, d.rng)),
    "lower case": Manner(lambda d: d.prompt.lower()),
    "SHOUTING": Manner(lambda d: d.prompt.upper()),
    "correction": Manner(corrected, ("corrections",)),
    **dict(_pastes()),
    "middle of 50 words": Manner(partial(in_the_middle, kind="short"), ("short",)),
    "middle of 400 words": Manner(partial(in_the_middle, kind="middle"), ("middle",), 1),
    "beside 1500 words": Manner(_any_side, ("sayings", "long"), 1),
    "beside code": Manner(beside_code, ("sayings", "code")),
    "frame": Manner(framed, ("frame", "contexts")),
    "helper -> base": Manner(helped, ("helper",), is_own=False),
}


def cases(hand: Hand, most: int = 2) -> list[Case]:
    """All cases of a hand: `most` of each manner and skill, and each text of nobody's once."""
    return [*_of_prompts(hand, most), *_of_two(hand, most), *_of_others(hand), *_of_nobody(hand)]


def _of_prompts(hand: Hand, most: int) -> Iterator[Case]:
    able = {n: m for n, m in OF_SKILLS.items() if all(need in hand.texts for need in m.needs)}
    for name, manner in able.items():
        for draw in _draws(hand, name, min(most, manner.most or most)):
            made = manner.make(draw)
            if made:  # a hand may not say everything
                wanted = frozenset({draw.skill} if manner.is_own else ())
                yield Case(name, _turns(made), wanted, draw.skill)


def _draws(hand: Hand, manner: str, most: int) -> Iterator[Draw]:
    """The same prompts for each manner, so that manners can be compared."""
    for skill, content in hand.skills.items():
        prompts = random.Random(f"{SEED}/{skill}").sample(content["prompts"], most)
        for number, prompt in enumerate(prompts):
            rng = random.Random(f"{SEED}/{manner}/{skill}/{number}")
            yield Draw(hand, skill, prompt, rng)


def _of_two(hand: Hand, most: int) -> Iterator[Case]:
    """Two skills' requests in one message: either may answer."""
    if "joins" not in hand.texts:
        return
    for draw in _draws(hand, "two requests", most):
        other, prompt = draw.prompt_of_another()
        both = [(draw.skill, draw.prompt), (other, prompt)]
        draw.rng.shuffle(both)
        text = filled(draw.text("joins"), first=both[0][1], second=both[1][1])
        yield Case("two requests", _turns(text), frozenset({draw.skill, other}), draw.skill)


def _of_others(hand: Hand) -> Iterator[Case]:
    """The hurried user's word, and the first prompt in all languages."""
    for skill, content in hand.skills.items():
        rows = {"one word": content.get("word"), "en": content["prompts"][0]}
        rows |= {language: content.get(language) for language in LANGUAGES}
        for manner, text in rows.items():
            if text:
                yield Case(manner, _turns(text), frozenset({skill}), skill)


def _of_nobody(hand: Hand) -> Iterator[Case]:
    texts = hand.texts
    rows = {f"{kind} -> base": texts.get(kind, ()) for kind in ("general", "near", "neutral")}
    rows["general, polite -> base"] = _wrapped(hand, polite_or_none)
    rows["general, frame -> base"] = _wrapped(hand, framed_or_none)
    for manner, made in rows.items():
        for number, text in enumerate(made):
            yield Case(manner, _turns(text), frozenset(), f"{manner}/{number}")


def _wrapped(hand: Hand, wrap: Callable[[Draw], str | None]) -> Sequence[str]:
    general = enumerate(hand.texts.get("general", ()))
    draws = [Draw(hand, "", t, random.Random(f"{SEED}/{wrap.__name__}/{i}")) for i, t in general]
    return [text for text in map(wrap, draws) if text]


def polite_or_none(draw: Draw) -> str | None:
    kind = draw.rng.choice(POLITE)
    return polite(draw, kind) if kind in draw.hand.texts else None


def framed_or_none(draw: Draw) -> str | None:
    return framed(draw) if "frame" in draw.hand.texts else None


def _turns(made: Made) -> Turns:
    return (("user", made),) if isinstance(made, str) else made
