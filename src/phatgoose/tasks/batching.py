"""Batches as model inputs, and what a model makes of them: in passes, and as answers."""

from __future__ import annotations

import bisect
import heapq
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files import one_line
from ..passes import in_context, watching
from ..sites import Site, headless
from .encoding import Encoder, TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross-entropy leaves out
PAIR_TOKENS = 4096  # the same with targets


class Collator:
    """Collates token pairs into inputs for one kind of model.

    Causal models get prompt and target in one left-padded row, so that all targets end in the last
    columns. Sequence-to-sequence models get them separately. `labels` is [rows, longest target],
    IGNORED at padding. With `packs`, pairs share rows if the model can be packed: `labels` [1,
    tokens] has all target tokens, `places` [tokens] the positions that predict them. `active` are
    the tokens that an expert acts on which acts on the `tail` last ones of prompts and the answer.
    """

    def __init__(
        self, model: PreTrainedModel, pad: int, *, packs: bool = False, tail: int | None = None
    ) -> None:
        self._pad = pad
        self._tail = tail
        self._dtype = model.dtype
        # On several GPUs Trainer splits batches by rows, but places count all rows.
        self._packs = packs and can_pack(model) and torch.cuda.device_count() < 2
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        # In a causal model a prompt's last token predicts an answer's first.
        self._start = model.config.decoder_start_token_id if self._is_encoder_decoder else 0
        self._wants_positions = "position_ids" in inspect.signature(model.forward).parameters

    def __call__(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        if self._packs:
            return self._packed(pairs)
        if self._is_encoder_decoder:
            return self._seq2seq(pairs)
        return self._causal(pairs)

    def _packed(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        # A target's last token predicts nothing, so it is only a label.
        texts = [BranchedText((pair.prompt + pair.target)[:-1]) for pair in pairs]
        (rows,) = packed_batches([text.length for text in texts], sys.maxsize)
        by_row = [list(map(texts.__getitem__, row)) for row in rows]
        packed = pack_rows(by_row, self._pad, self._dtype)
        places = list[int]()
        labels = []
        prompts = list[int]()  # their lengths
        for index, start in zip(itertools.chain(*rows), packed.starts.tolist(), strict=True):
            pair = pairs[index]
            first = max(len(pair.prompt), 1)  # a text's first token can't be predicted
            places += range(start + first - 1, start + texts[index].length)
            labels += (pair.prompt + pair.target)[first:]
            prompts.append(len(pair.prompt))
        batch = {**packed.inputs, "labels": torch.tensor([labels]), "places": torch.tensor(places)}
        if self._tail is not None:
            begin = torch.tensor(prompts) - self._tail
            acts = packed.inputs["position_ids"] >= begin[packed.owners]
            batch["active"] = acts & (packed.owners >= 0)
        return batch

    def _causal(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        rows = [pair.prompt + pair.target for pair in pairs]
        ids, mask = padded_rows(pad_left, rows, self._pad)
        positions = position_ids(mask)
        labels = pad_left([pair.target for pair in pairs], IGNORED)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self._wants_positions:
            batch["position_ids"] = positions
        if self._tail is not None:
            prompts = torch.tensor([len(pair.prompt) for pair in pairs])
            batch["active"] = mask.bool() & (positions >= prompts[:, None] - self._tail)
        return batch

    def _seq2seq(self, pairs: Sequence[TokenPair]) -> dict[str, Tensor]:
        ids, mask = padded_rows(pad_right, [pair.prompt for pair in pairs], self._pad)
        targets = [pair.target for pair in pairs]
        inputs = [[self._start, *target[:-1]] for target in targets]
        decoder_ids, decoder_mask = padded_rows(pad_right, inputs, self._pad)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": decoder_ids,
            "decoder_attention_mask": decoder_mask,
            "labels": pad_right(targets, IGNORED),
        }


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """`rows` as [B, longest], with `value` before the shorter ones."""
    return pad_right([row[::-1] for row in rows], value).flip(-1)


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """`rows` as [B, longest], with `value` after the shorter ones."""
    longest = max(map(len, rows), default=0)
    padded = [list(row) + [value] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long)


def padded_rows(
    side: Callable[[Sequence[Sequence[int]], int], Tensor],
    rows: Sequence[Sequence[int]],
    value: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """(`rows` with `value` on that side of the shorter ones, which of their tokens are real)."""
    ids = side(rows, value)
    mask = side([[1] * len(row) for row in rows], 0)
    return ids.to(device), mask.to(device)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [rows, columns] that count real tokens only, so padding does not shift a text."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def batches_of_tokens(
    lengths: Sequence[int], budget: int, padding: int | None = None
) -> Iterator[list[int]]:
    """Batches of indices of rows of similar length, each at most `budget` tokens when padded.

    A row longer than the budget comes alone. With `padding` none has more than that and as much
    again as it is long.
    """
    batch: list[int] = []
    for index in longest_first(lengths):
        longest = lengths[batch[0]] if batch else 0
        is_short = padding is not None and longest > 2 * lengths[index] + padding
        if batch and (is_short or (len(batch) + 1) * longest > budget):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The indices of `lengths`, greatest first."""
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


# Batches with almost no padding: several texts share a row, and none attends to another.
#
# A text is a stem and branches that continue it: a prompt and its answer choices. A row holds
# texts one after the other. The attention mask lets a branch see only its stem and itself, and
# positions restart with each text and return to the stem's end with each branch. So the model's
# output for every token is the same as for its stem and branch alone.

IMPLEMENTATIONS = ("sdpa", "eager")  # of attention: those that add a mask to the scores
FULL = "full_attention"
# In a row of so many tokens, each costs twice as much as alone, because attention is computed over
# the whole row, masked parts too. Measured on SmolLM2-135M in bfloat16 on a CPU; it only decides
# how rows are filled.
COSTLY_ROW = 700
FILLS = (1.0, 0.95, 0.9, 0.8, 0.7)  # shares of its budget to which a batch may be filled


class BranchedText(NamedTuple):
    """A stem of at least one token, and branches that each continue it separately."""

    stem: Sequence[int]
    branches: Sequence[Sequence[int]] = ()

    @property
    def length(self) -> int:
        return len(self.stem) + sum(map(len, self.branches))


class PackedBatch(NamedTuple):
    """Texts as a batch of rows.

    `owners` [rows, columns] is the index of each token's text, -1 for padding; `starts` [texts] is
    where each text begins when the rows are concatenated. A text's tokens are contiguous: its stem,
    then its branches in order.
    """

    inputs: dict[str, Tensor]
    owners: Tensor
    starts: Tensor


def can_pack(model: PreTrainedModel) -> bool:
    """True for a causal model that takes positions and any attention mask in all its layers."""
    # Transformers passes a mask of four dimensions on unchanged only through its own attention
    # interface. Layers with a window or a state would see beyond their text.
    config = model.config.get_text_config()
    return bool(
        not model.config.is_encoder_decoder
        and model._supports_attention_backend
        and config._attn_implementation in IMPLEMENTATIONS
        and set(getattr(config, "layer_types", None) or [FULL]) == {FULL}
        and getattr(config, "sliding_window", None) is None
        and "position_ids" in inspect.signature(model.forward).parameters
    )


def packed_batches(lengths: Sequence[int], budget: int) -> Iterator[list[list[int]]]:
    """Batches of rows of text indices: every text once, at most `budget` tokens with padding."""
    order = longest_first(lengths)
    while order:
        totals = list(itertools.accumulate(map(lengths.__getitem__, order[: budget + 1])))
        # A nearly full batch may leave its last texts to the next one: all of them could take long
        # rows.
        cheapest = math.inf
        ends = {max(1, bisect.bisect_right(totals, fill * budget)) for fill in FILLS}
        for end in sorted(ends, reverse=True):
            cost, candidate = _rows(order[:end], lengths, budget)
            if cost < cheapest:
                cheapest = cost
                rows = candidate
        yield rows
        order = order[sum(map(len, rows)) :]


def _rows(
    order: Sequence[int], lengths: Sequence[int], budget: int
) -> tuple[float, list[list[int]]]:
    """The cost of a token, and the indices in `order`, longest first, in the cheapest rows."""
    total = sum(map(lengths.__getitem__, order))
    best = math.inf
    rows = []
    for count in range(-(-total // lengths[order[0]]), 0, -1):
        if 1 + total / count / COSTLY_ROW >= 0.98 * best:
            break  # even without padding, fewer and longer rows would save almost nothing
        heap = [(0, row, list[int]()) for row in range(count)]
        for index in order:  # each to the shortest row
            length, row, indices = heap[0]
            indices.append(index)
            heapq.heapreplace(heap, (length + lengths[index], row, indices))
        filled = [indices for _, _, indices in heap if indices]
        columns = max(heap)[0]
        tokens = len(filled) * columns
        cost = tokens / total * (1 + columns / COSTLY_ROW)
        # One row has no padding and so always fits, but its attention is seldom cheap.
        if cost < best and (tokens <= budget or count == 1):
            best = cost
            rows = filled
    return best, rows


def pack_rows(
    rows: Sequence[Sequence[BranchedText]], pad_token_id: int, dtype: torch.dtype
) -> PackedBatch:
    """The texts of each row as one batch, numbered row by row; `dtype` is that of the model."""
    columns = max(sum(text.length for text in row) for row in rows)
    shape = (len(rows), columns)
    tokens = torch.full(shape, pad_token_id)
    positions = torch.zeros(shape, dtype=torch.long)
    owners = torch.full(shape, -1)
    branches = torch.zeros(shape, dtype=torch.long)
    starts = []
    for row, texts in enumerate(rows):
        at = 0
        for text in texts:
            starts.append(row * columns + at)
            for branch, part in enumerate([text.stem, *text.branches]):
                end = at + len(part)
                begin = len(text.stem) if branch else 0
                tokens[row, at:end] = torch.tensor(part, dtype=torch.long)
                positions[row, at:end] = torch.arange(begin, begin + len(part))
                owners[row, at:end] = len(starts) - 1
                branches[row, at:end] = branch
                at = end
    # Whether each token (row of the mask) sees each (column).
    earlier = torch.ones(columns, columns, dtype=torch.bool).tril()
    same_text = owners.unsqueeze(2) == owners.unsqueeze(1)
    same_branch = branches.unsqueeze(2) == branches.unsqueeze(1)
    in_stem = (branches == 0).unsqueeze(1)
    first = torch.arange(columns) == 0
    # Padding sees its row's first token and not itself: `token_masks` recognises it by that.
    seen = earlier & same_text & (same_branch | in_stem)
    seen = torch.where(owners.eq(-1).unsqueeze(2), first, seen)
    mask = torch.zeros(len(rows), 1, columns, columns, dtype=dtype)
    mask.masked_fill_(~seen.unsqueeze(1), torch.finfo(dtype).min)
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
    return PackedBatch(inputs, owners, torch.tensor(starts))


# Up to so many tokens in a row, keeping all attention probabilities takes no more memory than the
# rest of a backward pass (six bytes per token, head and column).
SHORT_ROW = 256


def target_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits that predict `batch["labels"]` of a `Collator`: its shape and the vocabulary's."""
    inputs: dict[str, Any] = dict(batch)
    for ours in ("labels", "places", "active"):
        inputs.pop(ours, None)
    # The position before the first label predicts it; the last position predicts nothing here.
    kept = batch["labels"].shape[1] + 1
    is_causal = "places" not in batch and "decoder_input_ids" not in batch
    with ExitStack() as stack:
        stack.enter_context(active_at(batch.get("active")))
        if "places" in batch:
            stack.enter_context(head_at(model, batch["places"]))
            stack.enter_context(quick_backward(model, batch["input_ids"].shape[1]))
        elif is_causal and "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = kept
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[:, -kept:-1] if is_causal else logits


# Which tokens an expert acts on: all, or those from its prompt's end on (Activated LoRA).
#
# Such an expert (Greenewald et al. 2025, arXiv 2504.12397) adds nothing in a prompt's body, which
# is then the base's own. It acts at the prompt's last tokens, its tail, and at every token of the
# answer. Here one expert is alone, in training and measurements.

_ACTIVE: ContextVar[Tensor | None] = ContextVar("active tokens", default=None)


def active_at(active: Tensor | None) -> AbstractContextManager[None]:
    """The expert acts at these tokens of the passes in this context, [rows, columns]; None: all."""
    return in_context(_ACTIVE, active)


def where_active(strength: Tensor | float, u: Tensor) -> Tensor | float:
    """`strength` at tokens of u [.., n] that the expert acts on, and 0 elsewhere.

    A layer inside one of the base's own experts, which sees some tokens only, can't tell them.
    """
    active = _ACTIVE.get()
    if active is None:
        return strength
    return strength * active.to(u.device, u.dtype).reshape(*u.shape[:-1], 1)


@contextmanager
def _head_input(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def contiguous_head(model: nn.Module) -> AbstractContextManager[None]:
    """Hand the output layer of `model` contiguous rows while the context is open."""
    # Logits of the last positions reach it as a strided view, for which torch copies the whole
    # output matrix once per row: a quarter of a training step.
    return _head_input(model, lambda hidden: hidden.clone(memory_format=torch.contiguous_format))


def head_at(model: nn.Module, places: Tensor) -> AbstractContextManager[None]:
    """Compute logits at `places` only, which count a batch's tokens: [1, places, vocabulary]."""
    return _head_input(model, lambda hidden: hidden.flatten(0, 1)[places].unsqueeze(0))


@contextmanager
def quick_backward(model: PreTrainedModel, columns: int) -> Iterator[None]:
    """Use the attention with the faster backward pass for rows of `columns` tokens."""
    # On a CPU plain products take half the time of torch's fused kernel, but keep every
    # probability.
    usual = model.config.get_text_config()._attn_implementation
    if model.device.type != "cpu" or columns > SHORT_ROW or usual == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


# What a model makes of prompts: in passes with their targets, and as answers.


@torch.no_grad()
def read_pairs(
    model: PreTrainedModel,
    sites: Iterable[Site],
    pairs: Sequence[TokenPair],
    collator: Collator,
    see: Callable[[Site, Tensor], None],
    label: str | None = None,
) -> None:
    """Call `see(site, u)` with the inputs u [tokens, n] of `sites` for all real tokens of `pairs`.

    Prompt and target pass in one go (teacher forcing). With a `label` there is a progress bar. With
    a `collator` for an expert that acts on prompts' ends, only tokens that it acts on are seen.
    """
    inner = headless(model)
    model.eval()
    active: Tensor | None = None

    def see_real(site: Site, u: Tensor, real: Tensor | None) -> None:
        real = real if active is None else active  # which are real
        see(site, u.flatten(0, -2) if real is None else u[real])

    title = f"{one_line(label)}: means"
    hidden = True if label is None else None  # None: shown in a terminal only
    bars = tqdm(total=len(pairs), desc=title, unit="prompt", disable=hidden)
    with bars as bar, watching(model, sites, see_real):
        for rows in batches_of_tokens([pair.length for pair in pairs], PAIR_TOKENS):
            inputs = collator([pairs[row] for row in rows])
            # With labels the model would compute a loss.
            del inputs["labels"]
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            active = inputs.pop("active", None)
            with active_at(active):
                inner(**inputs, use_cache=False)
            bar.update(len(rows))


def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    **options: Any,
) -> Tensor:
    """The likeliest tokens after the prompts `ids` [rows, columns].

    `mask` is 0 at padding. Of the model's generation_config only the tokens that begin and end
    answers count; `options` are other settings of transformers' GenerationConfig.
    """
    from transformers import GenerationConfig

    usual = model.generation_config
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=usual.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    if model.config.is_encoder_decoder:
        config.decoder_start_token_id = model.config.decoder_start_token_id
    config.update(**options)
    # It would fill the open fields, and may penalise repetitions, suppress tokens or stop at texts.
    model.generation_config = GenerationConfig()
    try:
        with contiguous_head(model):
            output: Tensor = model.generate(ids, attention_mask=mask, generation_config=config)
    finally:
        model.generation_config = usual
    return output[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :]


def messages_by(
    model: PreTrainedModel, encoder: Encoder, count: int, most: int, seed: int
) -> list[str]:
    """What `model` writes in place of a user's message, at temperature 1: `count` texts.

    They end where the base's chat template ends a message, at any special token, and after `most`
    tokens.
    """
    start, following = encoder.around_message()
    tokenizer = encoder.tokenizer
    ids = torch.tensor([start] * count, device=model.device)
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    ends = {*end_tokens(model, tokenizer), *special}
    options = {"do_sample": True, "top_k": 0, "eos_token_id": [*ends]}  # its top_k is 50
    torch.manual_seed(seed)
    rows = continued(model, tokenizer, ids, torch.ones_like(ids), most, **options)
    messages = []
    for row in rows.tolist():
        tokens = list(itertools.takewhile(lambda token: token not in ends, row))
        message, _, _ = str(tokenizer.decode(tokens)).partition(following)
        messages.append(message.strip())
    return messages


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the model's, else the tokenizer's; [] if neither names any."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list | tuple) else [ends]
