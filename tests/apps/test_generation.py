"""Generation through routed models, against one token at a time."""

from dataclasses import replace

import pytest
import torch
from transformers import pipeline

from phatgoose.apps.generation import explain, form_for
from phatgoose.apps.generation import generate as written
from phatgoose.config import Formatting, PromptFormatting
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of
from phatgoose.tasks.task import Chat
from routed_models import compose_by, tailed
from topic_prompts import BEFORE, PROMPTS


def read_prompts_of(model) -> list:
    """The prompts that `model` reads from now on, call by call."""
    router, seen = composition_of(model).chooser, []
    choose = router.choose
    router.choose = lambda prompts, *a, **k: seen.append(prompts) or choose(prompts, *a, **k)
    return seen


NEW = 6
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@pytest.mark.parametrize("in_chats", [False, True])
@pytest.mark.parametrize("tails", [False, True])
def test_the_question_of_a_chat_is_read_as_plain_text(llama, llama_pool, in_chats, tails):
    """Alone, and as plain text, whether experts were trained in the template or not."""
    llama.tokenizer.chat_template = TEMPLATE
    changes = {"hyperparameters": {"chat": in_chats}} | ({"acts_on": {"tail": 3}} if tails else {})
    experts = [replace(each, info=replace(each.info, **changes)) for each in llama_pool.experts]
    model = compose_by("discriminant", Pool(tuple(experts)), llama)
    seen, question = read_prompts_of(model), PROMPTS[1]
    for turns in BEFORE.values():
        written(model, llama.tokenizer, Chat([*turns, ("user", question)]), 2)
    written(model, llama.tokenizer, question, 2, Formatting(chat=True))
    *chats, alone = [prompt for (prompt,) in seen]
    assert [chat.messages[-1].wholes[0] for chat in chats] == [question] * len(BEFORE)
    assert alone == question


@pytest.mark.parametrize(
    ("recorded", "template", "wanted", "is_chat"),
    [
        ((None, None), TEMPLATE, None, True),  # adapters of others say nothing
        ((None, None), None, None, False),
        ((None, True), TEMPLATE, None, True),
        ((None, False), TEMPLATE, None, False),
        ((True, False), TEMPLATE, None, False),
        (([], {}), TEMPLATE, None, False),  # what a stranger may have written
        ((True, True), TEMPLATE, False, False),
        ((False, False), TEMPLATE, True, True),
        ((), TEMPLATE, None, True),  # a base alone
    ],
)
def test_a_prompt_is_a_chat_as_experts_were_trained_or_where_there_is_a_template(
    llama, llama_pool, caplog, recorded, template, wanted, is_chat
):
    caplog.set_level("INFO")
    llama.tokenizer.chat_template = template
    forms = [{} if chat is None else {"chat": chat} for chat in recorded]
    experts = [
        replace(expert, info=replace(expert.info, hyperparameters=form))
        for expert, form in zip(llama_pool.experts, forms, strict=False)
    ]
    opened = llama
    if experts:
        opened = replace(llama, model=compose_by("discriminant", Pool(tuple(experts)), llama))
    form = form_for(opened, PromptFormatting(max_input_tokens=9, chat=wanted))
    assert form == Formatting(max_input_tokens=9, chat=is_chat)
    router, way = ("Router discriminant" if experts else "No router"), ("no-" if is_chat else "")
    assert caplog.messages[-1].startswith(f"{router}; the prompt is ")
    assert f"(--{way}chat: " in caplog.messages[-1]


def test_tokens_on_which_no_expert_acts_have_no_expert_s_colour(llama, llama_pool):
    model = compose(tailed(llama_pool.experts, (2, 2, 2, 2)), llama, router="phatgoose", k=1)
    explained = explain(model, llama.tokenizer, "one two three four five", "six seven")
    (text,) = explained.coloured()
    tokens = explained.trace.streams[0].tokens
    assert text.spans[0].start >= len("".join(tokens[:2]))
    assert text.spans[0].start < len("".join(tokens))


@pytest.mark.parametrize("kind", ["llama", "gpt2"], indirect=True)
def test_the_text_generation_pipeline_takes_a_routed_model(base, pool):
    model = compose(pool, base, router="phatgoose")
    pipe = pipeline("text-generation", model=model, tokenizer=base.tokenizer)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    answer = pipe("a goose", return_full_text=False, **options)[0]["generated_text"]
    ids = base.tokenizer("a goose", return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, -NEW:]
    assert answer == base.tokenizer.decode(tokens, skip_special_tokens=True)
