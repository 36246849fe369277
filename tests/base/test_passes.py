"""Who looks at what passes knows which tokens are padding, whatever is called and however."""

import threading
from contextlib import contextmanager

import pytest
import torch

from architectures import make_tiny
from phatgoose.errors import RoutingError
from phatgoose.passes import real_input_ids, watching
from phatgoose.sites import find_sites, prompt_stack
from tiny import logits_of, make_ids

LAYER = "model.layers.0.self_attn.q_proj"


def padded(rows: int = 2, pads: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and a mask that hides the first of the last row."""
    ids = make_ids(rows=rows)
    mask = torch.ones_like(ids)
    mask[-1, :pads] = 0
    return ids, mask


@contextmanager
def seeing(model, pattern: str | None = None):
    """By site a list of (u, real) for each pass while the context is open."""
    sites, seen = find_sites(model, pattern), {}
    with watching(
        model,
        sites.values(),
        lambda site, u, real: seen.setdefault(site.name, []).append((u, real)),
    ):
        yield seen


def test_masks_are_those_of_the_present_call(base):
    ids, mask = padded()
    with seeing(base.model) as seen:
        logits_of(base.model, ids, attention_mask=mask)
        logits_of(base.model, ids)
    stream = "encoder" if base.is_encoder_decoder else "decoder"
    for name, site in find_sites(base.model).items():
        (_, first), (_, second) = seen[name]
        assert second is None
        if site.stream == stream:
            assert torch.equal(first, mask.bool())


def test_a_mask_of_four_dimensions_tells_who_sees_itself(llama):
    ids, mask = padded()
    sees = torch.ones(7, 7).tril().bool() & mask.bool()[:, None, None]
    added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    with seeing(llama.model, LAYER) as seen:
        logits_of(llama.model, ids, attention_mask=sees)
        logits_of(llama.model, ids, attention_mask=added)
    assert all(torch.equal(real, mask.bool()) for _, real in seen[LAYER])
    kinds = {"sliding_attention": sees[..., -1:], "full_attention": sees}  # as Gemma takes them
    assert torch.equal(real_input_ids({"input_ids": ids, "attention_mask": kinds}), mask.bool())


def test_nothing_is_left_behind_even_after_an_error(base):
    def stop(*_):
        raise LookupError

    with pytest.raises(LookupError), watching(base.model, find_sites(base.model).values(), stop):
        logits_of(base.model, make_ids())
    for module in base.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@torch.no_grad()
def test_inputs_of_sites_are_seen_in_this_thread_only(base):
    seen, stack, (ids, mask) = [], prompt_stack(base.model), padded()
    site = next(iter(find_sites(base.model).values()))
    layer, entered = base.model.get_submodule(site.name), []
    handle = layer.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with watching(base.model, [site], lambda *seeing: seen.append(seeing)):
        stack(ids, attention_mask=mask)
        other = threading.Thread(target=lambda: stack(input_ids=ids))
        other.start()
        other.join()
    handle.remove()
    ((place, u, real),) = seen
    assert place == site
    assert torch.equal(u, entered[0])
    assert torch.equal(real, mask.bool())
    stack(input_ids=ids)
    assert len(seen) == 1


@pytest.mark.parametrize("architecture", ["led", "prophetnet"])
def test_a_model_that_pads_inside_is_refused_by_name(architecture):
    model, ids = make_tiny(architecture), make_ids(rows=2)
    told = r"(LED|ProphetNet)\w+ pads or transposes .* 2 x 7 tokens has 2 x (8|21) activations"
    with pytest.raises(RoutingError, match=told), seeing(model):
        logits_of(model, ids, attention_mask=torch.ones_like(ids))
    logits_of(model, ids)  # unwatched it works
