"""The positions of architectures, and that no input runs over them."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from phatgoose.apps.generation import generate
from phatgoose.base import Base, fingerprint, load_skeleton
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.sites import Positions, positions_of
from phatgoose.tasks.task import Example, Task
from tiny import make_tokenizer

IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 1}
FEW = {"vocab_size": 300, "max_position_embeddings": 40} | IDS
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = SMALL | {"intermediate_size": 16}
GPT2 = {"vocab_size": 300, "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2} | IDS
OPT = FEW | SMALL | {"ffn_dim": 16, "word_embed_proj_dim": 16}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
BART |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
KINDS_HERE = {"gpt2": GPT2, "opt": OPT, "bart": FEW | BART}
T5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        *((kind, settings, Positions(40, 40)) for kind, settings in KINDS_HERE.items()),
        ("roberta", FEW | LLAMA | {"is_decoder": True}, Positions(39, 39)),  # one is padding's
        ("llama", FEW | LLAMA, Positions(trained=40)),
        ("t5", T5, Positions()),
    ],
)
def test_positions_are_those_of_the_table_or_of_the_training(kind, settings, wanted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_skeleton(AutoConfig.for_model(kind, **settings))
    assert positions_of(model) == wanted


def few_places(kind: str) -> Base:
    """A base that holds 24 tokens, of a kind whose positions are a table."""
    torch.manual_seed(0)
    name = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    config = AutoConfig.for_model(kind, **{**KINDS_HERE[kind], name: 24})
    auto = AutoModelForSeq2SeqLM if kind == "bart" else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.forced_eos_token_id = None
    tokenizer = make_tokenizer(final_eos=kind == "bart")
    return Base(model, tokenizer, "few", None, fingerprint(model))


LONG = "a passage of far more than twenty-four letters. Is it so?"
CHOOSING = Task("choosing", test=(Example(LONG, "yes", ("yes", "no, never")),) * 2)
WRITING = Task("writing", test=(Example(LONG, "yes"),))


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_scoring_and_generation_leave_room_for_the_answer(kind):
    base = few_places(kind)
    room = (24, 24, 24) if kind == "bart" else (13, 16, 20)  # its decoder has places of its own
    with pytest.warns(UserWarning, match=f"choosing: 2 of 2 inputs cut to {room[0]} tokens"):
        evaluate(base, CHOOSING)
    with pytest.warns(UserWarning, match=f"writing: 1 of 1 input cut to {room[1]} tokens"):
        evaluate(base, WRITING, max_new_tokens=8)
    with pytest.warns(UserWarning, match=f"the prompt: 1 of 1 input cut to {room[2]} tokens"):
        generate(base.model, base.tokenizer, LONG, 4)
