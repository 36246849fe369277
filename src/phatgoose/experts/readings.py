"""Readings: how the base alone reads an expert's prompts, block by block (docs/format.md).

A decoder knows its task only when it has seen the whole prompt. So a prompt is read in two places:
at its end, the hidden state of its last token, and as a whole, the mean over its tokens. An expert
shares their mean and covariance over its training prompts; router discriminant compares new prompts
with them. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..base.offloading import input_device
from ..files.quoting import one_line
from ..tasks.collating import batches_of_tokens, pad_right

__all__ = ["PLACES", "RANK", "covariance", "read_prompts", "readings_of", "readings_problems"]
__all__ += ["readings_size"]

PLACES = ("end", "whole")
PARTS = {"mean": 2, "factor": 3, "rest": 2}  # of a place, and how many dimensions each has
RANK = 16  # of the covariance that is shared


@torch.no_grad()
def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], budget: int, label: str = ""
) -> dict[str, Tensor]:
    """What `model` makes of each prompt, by place: float32 [prompts, blocks, d].

    `prompts` are lists of tokens, none empty; a pass takes at most `budget` of them where one
    prompt is no longer. `label` stands before a progress bar. The blocks are those of the encoder where there is one; "end" is the output
    of each for the prompt's last token, "whole" the mean over all of its tokens. What the last block
    puts out may have passed the stack's final norm.
    """
    stack = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    device, lengths = input_device(model), [len(prompt) for prompt in prompts]
    found: dict[str, Tensor] = {}
    bar = tqdm(total=len(prompts), desc=f"{one_line(label)}: readings", unit="prompt", disable=None)
    for rows in batches_of_tokens(lengths, budget):
        ids = pad_right([prompts[row] for row in rows], 0).to(device)
        mask = pad_right([[1] * lengths[row] for row in rows], 0).to(device)
        states = stack(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, return_dict=True
        ).hidden_states[1:]
        ends = mask.sum(dim=1) - 1
        shares = (mask / mask.sum(dim=1, keepdim=True)).float()[:, None]
        index = torch.arange(len(rows), device=device)
        for block, state in enumerate(states):
            read = {"end": state[index, ends], "whole": (shares @ state.float())[:, 0]}
            for place, values in read.items():
                if place not in found:
                    found[place] = torch.empty(len(prompts), len(states), state.shape[-1])
                found[place][rows, block] = values.float().cpu()
        bar.update(len(rows))
    bar.close()
    return found


def readings_of(read: Mapping[str, Tensor], rank: int = RANK) -> dict[str, Tensor]:
    """The readings to share, of what `read_prompts` gave, float32 by name.

    For each place `PLACE.mean` [blocks, d], and the covariance over prompts, whose denominator is
    their number, as `PLACE.factor` [blocks, rank, d], its `rank` strongest directions times the
    root of their strength, and `PLACE.rest` [blocks, d], what these leave of its diagonal.
    """
    found = {}
    for place, values in read.items():
        found[f"{place}.mean"] = values.mean(dim=0)
        centred = (values - values.mean(dim=0)).transpose(0, 1).double()  # [blocks, prompts, d]
        factors = torch.stack([_strongest(block, rank) for block in centred])
        variance = centred.square().mean(dim=1)
        found[f"{place}.factor"] = factors.float()
        found[f"{place}.rest"] = (variance - factors.square().sum(dim=1)).clamp(min=0).float()
    return found


def readings_size(config: PreTrainedConfig) -> int:
    """How many numbers the readings of a base with this `config` are."""
    text = config.get_text_config()
    return len(PLACES) * int(text.num_hidden_layers) * int(text.hidden_size) * (2 + RANK)


def covariance(readings: Mapping[str, Tensor], place: str) -> Tensor:
    """The covariance that `readings` share of `place`, float64 [blocks, d, d]."""
    factor = readings[f"{place}.factor"].double()
    return factor.transpose(1, 2) @ factor + torch.diag_embed(readings[f"{place}.rest"].double())


def readings_problems(readings: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with `readings` as such, as ends of a sentence; empty when nothing is."""
    wanted = [f"{place}.{part}" for place in PLACES for part in PARTS]
    if set(readings) != set(wanted):
        return [f"they are {', '.join(sorted(readings))}; wanted {', '.join(wanted)}"]
    blocks, size = readings["end.mean"].shape[0], readings["end.mean"].shape[-1]
    problems = []
    for name, tensor in readings.items():
        dimensions = PARTS[name.partition(".")[2]]
        fits = tensor.dim() == dimensions and tensor.shape[::dimensions - 1] == (blocks, size)
        if not fits or tensor.dtype != torch.float32 or not tensor.numel():
            problems.append(
                f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, wanted "
                f"{dimensions} dimensions, {blocks} blocks first and {size} numbers last, float32"
            )
        elif name.endswith("rest") and (tensor < 0).any():
            problems.append(f"{name} has variances below 0")
    return problems


def _strongest(centred: Tensor, rank: int) -> Tensor:
    """The `rank` strongest directions of `centred` [prompts, d] times their deviation, [rank, d].

    Rows of zeros stand for directions that there are not.
    """
    count, size = centred.shape
    gram = centred @ centred.T if count < size else centred.T @ centred
    values, vectors = torch.linalg.eigh(gram)  # ascending
    kept = min(rank, len(values))
    values, vectors = values[-kept:].flip(0).clamp(min=0), vectors[:, -kept:].flip(1).T
    strongest = vectors @ centred if count < size else vectors * values.sqrt()[:, None]
    return torch.nn.functional.pad(strongest / count**0.5, (0, 0, 0, rank - kept))
