"""The blocks that a prompt passes, and what comes out of them."""

from threading import Thread

import pytest
import torch

from other_encoders import make_other
from phatgoose.errors import RoutingError
from phatgoose.passes import watch_blocks
from phatgoose.sites import blocks_of, prompt_stack
from tiny import make_ids


def test_the_blocks_are_those_that_read_the_prompt(base):
    names = {id(module): name for name, module in base.model.named_modules()}
    found = [names[id(block)] for block in blocks_of(base.model)]
    assert len(found) == 2
    assert all(name.endswith(f".{i}") for i, name in enumerate(found))
    assert all(name.startswith("encoder") == base.is_encoder_decoder for name in found)


@torch.no_grad()
def test_what_a_block_puts_out_is_seen_in_this_thread_only(base):
    seen, stack, ids = [], prompt_stack(base.model), make_ids(rows=2)
    with watch_blocks(base.model, (-1, 0, 1), lambda *seeing: seen.append(seeing)):
        hidden = stack(input_ids=ids, output_hidden_states=True).hidden_states
        other = Thread(target=lambda: stack(input_ids=ids))
        other.start()
        other.join()
    assert [index for index, _ in seen] == [-1, 0, 1]
    assert torch.equal(seen[0][1], hidden[0])
    assert torch.equal(seen[1][1], hidden[1])
    stack(input_ids=ids)
    assert len(seen) == 3


def test_blocks_that_pad_inside_are_refused():
    model, ids = make_other("led"), make_ids(rows=2)
    refused = pytest.raises(RoutingError, match=r"LEDFor.* pads or transposes its tokens inside")
    with refused, watch_blocks(model, (0,), lambda *_: None):
        prompt_stack(model)(input_ids=ids, attention_mask=torch.ones_like(ids))
