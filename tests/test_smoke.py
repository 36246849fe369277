import torch
from phatgoose import Pool, compose, detach


def test_compose(base, make_expert):
    for i in range(3):
        make_expert(base, f"e{i}", seed=i)
    pool = Pool.open([*(e.directory for e in [make_expert(base, "e9", seed=9)])])
    ids = torch.arange(3, 13)[None]
    extra = {"decoder_input_ids": ids[:, :4]} if base.is_encoder_decoder else {}
    before = base.model(ids, **extra).logits
    model = compose(pool, base, k=1)
    after = model(ids, **extra).logits
    assert not torch.allclose(before, after)
    assert torch.equal(detach(model)(ids, **extra).logits, before)
