"""SmolLM2 as a prefix LM: a prompt's tokens see each other both ways, answers stay causal.

    python research/prefix_lm.py check                    that this is so
    python research/prefix_lm.py losses BASE TRAIN.jsonl…  the base's own, under both masks
    python research/prefix_lm.py merge EXPERT OUT         SmolLM2 with an expert in its weights
    python research/prefix_lm.py train|stats|… ARGUMENTS  phatgoose's command line under the mask
    python research/prefix_lm.py SCRIPT.py ARGUMENTS      a script of this folder under it

Runs by the package of commit 6aa0f67a (README.md), whose functions it replaces.
Nothing of the installed package changes: its makers of masks are replaced in this process. A text
without an answer is a prompt. Never route a pool trained here without this script.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.llama import modeling_llama

from phatgoose.base.loading import Base, load_base
from phatgoose.evaluation.likelihood import choice_log_likelihoods
from phatgoose.tasks import batching
from phatgoose.tasks.batching import BranchedText, Collator
from phatgoose.tasks.encoding import Encoder, TokenPair
from phatgoose.tasks.loading import load_task
from phatgoose.tasks.task import draw

CAUSAL = Collator._causal
VISIBLE = batching._visible


def switch() -> None:
    """Let prompts be seen both ways in every pass from now on."""
    # Of masks [rows, tokens], which come with prompts alone and with single tokens of an answer.
    modeling_llama.create_causal_mask = lambda *_, position_ids, **given: create_bidirectional_mask(
        **given, allow_is_bidirectional_skip=False
    )
    batching._visible = visible
    Collator._packed, Collator._causal = packed, padded


def visible(owners: Tensor, branches: Tensor) -> Tensor:
    """As in `batching`, and stems see all of themselves."""
    stem = (branches == 0) & (owners >= 0)
    same = owners.unsqueeze(2) == owners.unsqueeze(1)
    return VISIBLE(owners, branches) | (same & stem.unsqueeze(2) & stem.unsqueeze(1))


def packed(self: Collator, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
    """As in `Collator`, where a prompt is a stem and its target a branch."""
    texts = [BranchedText(pair.prompt, [pair.target[:-1]]) for pair in pairs]
    (rows,) = batching.packed_batches([text.length for text in texts], sys.maxsize)
    found = batching.pack_rows([[texts[i] for i in row] for row in rows], self._pad, self._dtype)
    places, labels = list[int](), list[int]()
    order = [index for row in rows for index in row]
    for index, start in zip(order, found.starts.tolist(), strict=True):
        places += range(start + len(pairs[index].prompt) - 1, start + texts[index].length)
        labels += pairs[index].target
    return {**found.inputs, "labels": torch.tensor([labels]), "places": torch.tensor(places)}


def padded(self: Collator, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
    """As in `Collator`, with a mask [rows, 1, tokens, tokens]."""
    batch = CAUSAL(self, pairs)
    real = batch["attention_mask"].bool()
    columns = real.shape[1]
    ends = torch.tensor([columns - len(pair.target) for pair in pairs])
    prompt = real & (torch.arange(columns) < ends[:, None])
    earlier = torch.ones(columns, columns, dtype=torch.bool).tril() & real.unsqueeze(1)
    seen = earlier | (prompt.unsqueeze(1) & prompt.unsqueeze(2))
    seen[..., -1] |= ~real  # padding sees something, but not itself
    mask = torch.zeros(len(pairs), 1, columns, columns, dtype=self._dtype)
    batch["attention_mask"] = mask.masked_fill_(~seen[:, None], torch.finfo(self._dtype).min)
    return batch


def loss(base: Base, pairs: Sequence[TokenPair]) -> float:
    """The mean negative log-likelihood of targets' tokens."""
    collate, total, count = Collator(base.model, base.tokenizer.pad_token_id, packs=True), 0.0, 0
    for start in range(0, len(pairs), 16):
        batch = collate(pairs[start : start + 16])
        with torch.no_grad():
            logits = batching.target_logits(base.model, batch).float()
        total += torch.nn.functional.cross_entropy(
            logits[0], batch["labels"][0], reduction="sum"
        ).item()
        count += batch["labels"].numel()
    return total / count


def losses(base: str, *files: str) -> None:
    """Print the base's loss on rows that choose checkpoints, causal and under the mask."""
    loaded = load_base(base)
    encoder = Encoder.for_model(loaded.model, loaded.tokenizer)
    tasks = [load_task(Path(file)).with_validation(0) for file in files]
    pairs = {task.name: encoder.pairs(draw(task.validation, 48, 0)) for task in tasks}
    causal = {name: loss(loaded, rows) for name, rows in pairs.items()}
    switch()
    for name, rows in pairs.items():
        print(f"{name}: causal {causal[name]:.3f}, prefix {loss(loaded, rows):.3f}", flush=True)


def merge(expert: str, out: str) -> None:
    """Write the base that an expert makes of SmolLM2."""
    base = load_base("smollm2")
    PeftModel.from_pretrained(base.model, expert).merge_and_unload().save_pretrained(out)
    base.tokenizer.save_pretrained(out)


def check() -> None:
    """Fail unless prompts see what is later in them, answers don't, and all ways to pass agree."""
    base = load_base("smollm2", dtype="float32")
    encoder = Encoder.for_model(base.model, base.tokenizer)
    one = encoder.pair("The first of these is a fruit: apple, run, fall.", "apple")
    two = encoder.pair("Name a colour.", "dark blue, I think")
    print(f"before: loss {loss(base, [one, two]):.3f}")
    switch()
    print(f"after: loss {loss(base, [one, two]):.3f}")
    collate = Collator(base.model, base.tokenizer.pad_token_id)

    def states(*pairs: TokenPair) -> Tensor:
        batch = collate(pairs)
        batch.pop("labels")
        return base.model.model(**batch, use_cache=False).last_hidden_state

    def close(a: Any, b: Any) -> bool:
        return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=2e-3, rtol=1e-3)

    n, m = len(two.prompt), len(two.target)
    with torch.no_grad():
        whole = states(two)[0]
        other = TokenPair([*two.prompt[:-1], 1000], two.target)
        assert not close(whole[0], states(other)[0, 0]), "a prompt's first token sees its last"
        other = TokenPair(two.prompt, [*two.target[:-1], 1000])
        assert close(whole[:-1], states(other)[0, :-1]), "nothing sees an answer's next token"
        assert close(whole, states(one, two)[1, -n - m :]), "padding changes nothing"
        cache, tokens = DynamicCache(), two.prompt + two.target
        steps = [base.model.model(torch.tensor([two.prompt]), cache=cache)]
        for token in two.target:
            steps.append(base.model.model(torch.tensor([[token]]), cache=cache))
        stepwise = torch.cat([step.last_hidden_state[0] for step in steps])
        assert close(whole, stepwise), "token by token with a cache as in one pass"
        chosen = [(pair.prompt, [pair.target, two.target]) for pair in (one, two)]
        found = dict(choice_log_likelihoods(base.model, chosen, 0, 4096))
        likely = [-loss(base, [pair]) for pair in (one, two)]
        assert close([found[0][0], found[1][0]], likely), "choices as in training"
        prompts = batching.pad_left([one.prompt, two.prompt], 0)
        masks = batching.pad_left([[1] * len(one.prompt), [1] * n], 0)
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        made = base.model.generate(prompts, attention_mask=masks, **options)[1]
        for place in range(len(one.prompt), len(made)):
            answer = made[len(one.prompt) : place].tolist()
            logits = base.model.lm_head(states(TokenPair(two.prompt, answer))[0, -1])
            assert logits.argmax() == made[place], "generated as by whole passes"
            if made[place] == base.tokenizer.eos_token_id:
                break
    print(f"{len(tokens)} tokens: all as it should be")


if __name__ == "__main__":
    command = sys.argv.pop(1)
    if command in ("check", "losses", "merge"):
        globals()[command](*sys.argv[1:])
    elif command.endswith(".py"):
        switch()
        sys.argv[0] = command
        runpy.run_path(command, run_name="__main__")
    else:
        switch()
        sys.argv.insert(1, command)
        runpy.run_module("phatgoose", run_name="__main__")
