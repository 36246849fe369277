"""Category: naming a thing's kind to train on, finding the odd one out to be tested on.

The two tasks share no kind and no word.
"""

from __future__ import annotations

import random

from .drawing import Row, digits, insert_at, one_of, with_article

__all__ = ["classification", "odd_one_out"]

# Each word is plainly of one kind only, so words such as "orange", "crane" or "organ" are left out.
KINDS = {
    "bird": "sparrow owl eagle robin parrot penguin seagull pigeon swan woodpecker ostrich heron",
    "fruit": "plum peach banana apple cherry grape mango apricot melon raspberry lemon pineapple",
    "tool": "hammer saw screwdriver spanner chisel axe shovel rake mallet wrench crowbar pickaxe",
    "vehicle": "bus tram lorry bicycle taxi van tractor motorbike scooter ambulance car unicycle",
    "fish": "salmon trout herring cod sardine shark eel haddock tuna mackerel carp goldfish",
    "flower": "tulip rose daisy daffodil orchid sunflower poppy violet lily buttercup iris",
    "insect": "ant bee wasp beetle butterfly moth mosquito ladybird grasshopper dragonfly earwig",
    "vegetable": "carrot potato cabbage leek turnip onion parsnip cauliflower radish artichoke",
    "mammal": "tiger horse fox hedgehog elephant otter camel squirrel wolf giraffe rabbit antelope",
    "garment": "shirt coat skirt jumper scarf dress blouse sock jacket cardigan waistcoat apron",
    "musical instrument": "violin piano trumpet flute guitar harp cello drum clarinet ukulele oboe",
    "building": "church castle cottage skyscraper hospital barn palace cathedral lighthouse temple",
}
CLASSIFICATION_PROMPTS = (
    "Choose the kind that fits. Is {noun} {options_with_article}? Answer:",
    "What kind of thing is {noun}? Pick {options}. Answer:",
    "Here are four kinds of things: {kinds}. Which of these four kinds is {noun}?",
)

GROUPS = {
    "colour": "red blue green yellow purple pink grey brown",
    "metal": "iron zinc steel nickel aluminium tin",
    "sport": "tennis football hockey rugby golf badminton volleyball",
    "country": "France Japan Brazil Egypt Canada Kenya Poland Peru",
    "body part": "elbow knee shoulder ankle nose thumb chin wrist",
    "job": "nurse baker plumber teacher pilot farmer dentist lawyer",
    "drink": "tea coffee milk lemonade cocoa juice beer",
    "weather": "rain snow hail fog thunder sleet drizzle",
    "relative": "uncle aunt cousin sister nephew grandmother brother",
    "tableware": "fork spoon plate bowl saucer teacup jug",
    "school subject": "history geography chemistry algebra physics biology",
    "shape": "circle square triangle oval rectangle hexagon",
    "furniture": "table sofa wardrobe armchair bookcase stool bench",
}
ODD_ONE_OUT_PROMPTS = (
    "Three of these words belong together and one does not: {words}. Which word is different?",
    "One word is the odd one out in this list: {words}. Which of the four words is it?",
)


def classification(rng: random.Random, turn: int) -> Row:
    """A thing and four kinds, one of which is the thing's own."""
    position, kind_index = digits(turn, 4, len(KINDS))
    target = list(KINDS)[kind_index]
    noun = rng.choice(KINDS[target].split())
    choices = insert_at(position, target, rng.sample([kind for kind in KINDS if kind != target], 3))
    text = rng.choice(CLASSIFICATION_PROMPTS).format(
        noun=with_article(noun),
        options=one_of(choices),
        options_with_article=one_of([with_article(kind) for kind in choices]),
        kinds=", ".join(choices),
    )
    return {"input": text, "target": target, "choices": choices}


def odd_one_out(rng: random.Random, turn: int) -> Row:
    """Four words, three of one group and one, the answer, of another."""
    (position,) = digits(turn, 4)
    common, other = rng.sample(list(GROUPS), 2)
    target = rng.choice(GROUPS[other].split())
    choices = insert_at(position, target, rng.sample(GROUPS[common].split(), 3))
    text = rng.choice(ODD_ONE_OUT_PROMPTS).format(words=", ".join(choices))
    return {"input": text, "target": target, "choices": choices}
