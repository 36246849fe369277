"""Generation through routed models, against one token at a time."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, pipeline

from phatgoose.apps.generation import generate as written
from phatgoose.config import Formatting
from phatgoose.errors import ConfigError
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose
from phatgoose.tasks.task import Chat
from routed_models import compose_by, with_embeddings
from tiny import make_ids
from topic_prompts import BEFORE, PROMPTS, read_prompts_of

NEW = 6
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_p": 0.95},
    "beams": {"num_beams": 3, "do_sample": False},
}


def generate(model, ids, **options):
    torch.manual_seed(0)
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **length, **options)


def test_a_router_that_goes_by_answer_choices_generates_nothing(llama, llama_pool, toy_embedder):
    pool = with_embeddings(llama_pool, "paper")
    model = compose(pool, llama, router="retrieval:form=paper")
    with pytest.raises(ConfigError, match="form=paper embeds answer choices"):
        written(model, llama.tokenizer, "Hi")


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@pytest.mark.parametrize("in_chats", [False, True])
@pytest.mark.parametrize("tails", [False, True])
def test_the_question_of_a_chat_is_read_as_training_prompts_were(
    llama, llama_pool, in_chats, tails
):
    """Alone, and plainly, unless all experts were trained in the template."""
    llama.tokenizer.chat_template = TEMPLATE
    changes = {"hyperparameters": {"chat": in_chats}} | ({"acts_on": {"tail": 3}} if tails else {})
    experts = [replace(each, info=replace(each.info, **changes)) for each in llama_pool.experts]
    model = compose_by("discriminant", Pool(tuple(experts)), llama)
    seen, question = read_prompts_of(model), PROMPTS[1]
    wanted = llama.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    tokens = llama.tokenizer(wanted if in_chats else question, add_special_tokens=False)
    for turns in BEFORE.values():
        written(model, llama.tokenizer, Chat([*turns, ("user", question)]), 2)
    written(model, llama.tokenizer, question, 2, Formatting(chat=True))
    assert [list(prompt) for (prompt,) in seen] == [tokens["input_ids"]] * (len(BEFORE) + 1)


@pytest.mark.parametrize("way", WAYS)
def test_generation_with_and_without_a_cache_is_the_same(base, pool, way):
    model, ids = compose(pool, base, router="phatgoose"), make_ids()
    with_cache = generate(model, ids, use_cache=True, **WAYS[way])
    assert torch.equal(with_cache, generate(model, ids, use_cache=False, **WAYS[way]))


def test_a_text_is_generated_by_the_model_alone_whatever_its_base_would_have(base, pool):
    model = compose(pool, base, router="phatgoose")
    plain = written(model, base.tokenizer, "a goose", NEW)
    tokens = base.tokenizer(plain, add_special_tokens=False)["input_ids"]
    own = {"repetition_penalty": 1.3, "suppress_tokens": tokens[-2:-1], "top_k": 1}
    model.generation_config = GenerationConfig(**own, stop_strings=["a"], eos_token_id=1)
    assert written(model, base.tokenizer, "a goose", NEW) == plain


@pytest.mark.parametrize("kind", ["llama", "gpt2"], indirect=True)
def test_the_text_generation_pipeline_takes_a_routed_model(base, pool):
    model = compose(pool, base, router="phatgoose")
    pipe = pipeline("text-generation", model=model, tokenizer=base.tokenizer)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    answer = pipe("a goose", return_full_text=False, **options)[0]["generated_text"]
    ids = base.tokenizer("a goose", return_tensors="pt")["input_ids"]
    tokens = generate(model, ids, do_sample=False)[0, -NEW:]
    assert answer == base.tokenizer.decode(tokens, skip_special_tokens=True)
