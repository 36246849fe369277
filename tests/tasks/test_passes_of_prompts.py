"""Passes of prompts against passes of each alone, and answers against an argmax loop."""

import pytest
import torch
from transformers import GenerationConfig

from phatgoose.sites import find_sites
from phatgoose.tasks.batching import PromptReading, continued, end_tokens, read_prompts
from tiny import logits_of, make_ids

PROMPTS = [make_ids(tokens=n, seed=n)[0].tolist() for n in (4, 9, 1, 6)]


def alone(base, prompt, sites, blocks) -> torch.Tensor:
    """The same of one prompt, by torch's own hooks and transformers' hidden states."""
    seen = []
    model = base.model
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        for name in sites
    ]
    stack = model.get_encoder() if base.is_encoder_decoder else model.base_model
    with torch.no_grad():
        hidden = stack(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    seen += [hidden[index + 1][0] for index in blocks]
    return torch.stack([tokens.mean(dim=0) for tokens in seen])


def test_what_is_read_is_what_each_prompt_alone_gives(base, monkeypatch):
    monkeypatch.setattr("phatgoose.tasks.batching.BATCH_TOKENS", 18)
    stack = "encoder" if base.is_encoder_decoder else ""
    site = next(site for name, site in find_sites(base.model).items() if stack in name)
    got = read_prompts(base.model, PROMPTS, PromptReading((site, 0)))
    wanted = torch.stack([alone(base, prompt, (site.name,), (0,)) for prompt in PROMPTS])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


PENALTIES = {"repetition_penalty": 1.3, "suppress_tokens": [0, *range(3, 100)], "num_beams": 3}
PENALTIES |= {"stop_strings": ["a"], "guidance_scale": 2.0, "do_sample": True, "max_length": 4}
PENALTIES |= {"min_new_tokens": 9, "forced_eos_token_id": 150, "return_dict_in_generate": True}


def by_argmax(base, ids, tokens):
    """The likeliest token after all before it, again and again, until one ends the answer."""
    answer = [0] if base.is_encoder_decoder else ids[0].tolist()
    for _ in range(tokens):
        given = {"decoder_input_ids": torch.tensor([answer])} if base.is_encoder_decoder else {}
        logits = logits_of(base.model, ids if given else torch.tensor([answer]), **given)
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == 1:
            break
    return answer


@pytest.mark.parametrize("ends", [1, [1], None])
def test_greedy_takes_the_likeliest_token_whatever_the_base_would_have(base, ends):
    ids = torch.tensor([base.tokenizer("to be or not")["input_ids"]])
    wanted = by_argmax(base, ids, 20)
    base.model.generation_config = GenerationConfig(**PENALTIES, eos_token_id=ends)
    before = base.model.generation_config.to_dict()
    answer = continued(base.model, base.tokenizer, ids, torch.ones_like(ids), 20)
    assert answer[0].tolist() == wanted
    assert base.model.generation_config.to_dict() == before


def test_an_answer_ends_where_the_base_says_or_else_its_tokenizer(llama):
    llama.model.generation_config.eos_token_id = None
    assert end_tokens(llama.model, llama.tokenizer) == [1]
    llama.model.generation_config.eos_token_id = [5, 6]
    assert end_tokens(llama.model, llama.tokenizer) == [5, 6]
