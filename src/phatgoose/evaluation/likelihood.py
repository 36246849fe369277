"""Log-likelihoods of answer choices; each prompt is computed once if that can be.

A causal model reads a prompt and all its choices in one row, and no choice sees another
(`tasks.batching`). If its attention can't do that, each choice is read with its prompt; a
sequence-to-sequence model keeps the encoder's output.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import EvaluationError
from ..tasks import batching
from ..tasks.batching import (
    IGNORED,
    BranchedText,
    pad_left,
    pad_right,
    padded_rows,
    position_ids,
)

Tokens = Sequence[int]
BeforePass = Callable[[Sequence[int]], None]  # takes the index of the prompt of each row to come
LOGITS_AT_ONCE = 512  # rows of logits that are float32 at a time
ChoicePrompt = tuple[Tokens, Sequence[Tokens]]  # a prompt and its choices, tokenised
ChoicePrompts = Sequence[ChoicePrompt]
Means = Iterator[tuple[int, list[float]]]  # of a row's choices, by its index


def choice_log_likelihoods(
    model: PreTrainedModel,
    rows: ChoicePrompts,
    pad_token_id: int,
    budget: int,
    before_pass: BeforePass = lambda _: None,
) -> Means:
    """(index of the row, mean log-likelihood per target token of each choice), in any order.

    The end-of-sequence token counts as a target token (the paper's released code). A batch holds at
    most `budget` tokens, padding included. `before_pass` gets indices in `rows` before each pass:
    one for each row of the batch, or for each token where rows are packed. Raises EvaluationError
    for a causal model's prompt without tokens.
    """
    if not model.config.is_encoder_decoder and not all(prompt for prompt, _ in rows):
        raise EvaluationError("An input has no tokens, so no choice can follow it.")
    score = _packed if batching.can_pack(model) else _padded
    # A choice that a row has twice is computed once, so that it ties with itself.
    distinct = []
    for prompt, choices in rows:
        distinct.append((prompt, list(dict.fromkeys(map(tuple, choices)))))
    with torch.inference_mode():
        for index, means in score(model, distinct, pad_token_id, budget, before_pass):
            _, computed = distinct[index]
            by_choice = dict(zip(computed, means, strict=True))
            yield index, [by_choice[tuple(choice)] for choice in rows[index][1]]


def _packed(
    model: PreTrainedModel, rows: ChoicePrompts, pad: int, budget: int, before_pass: BeforePass
) -> Means:
    # The last token of a choice is predicted, not read.
    texts = []
    for prompt, choices in rows:
        texts.append(BranchedText(prompt, [choice[:-1] for choice in choices]))
    for batch in batching.packed_batches([text.length for text in texts], budget):
        by_row = [list(map(texts.__getitem__, row)) for row in batch]
        packed = batching.pack_rows(by_row, pad, model.dtype)
        order = list(itertools.chain(*batch))
        # Padding's owner is -1.
        before_pass(list(map(order.__getitem__, packed.owners.flatten().tolist())))
        # What predicts a target: of each text the stem's last token, and its branches.
        places = list[int]()
        for index, start in zip(order, packed.starts.tolist(), strict=True):
            text = texts[index]
            places += range(start + len(text.stem) - 1, start + text.length)
        inputs = {name: tensor.to(model.device) for name, tensor in packed.inputs.items()}
        with batching.head_at(model, torch.tensor(places, device=model.device)):
            logits = model(**inputs, use_cache=False).logits.squeeze(0)
        yield from _means(logits, [rows[index][1] for index in order], order)


def _means(logits: Tensor, choices: Sequence[Sequence[Tokens]], indices: Sequence[int]) -> Means:
    """(index, means) from the logits [places, vocabulary] of texts, one text after the other."""
    # The first place of a text predicts the first token of all its choices, the next ones the rest.
    places = []
    labels = list[int]()
    lengths = []
    first = 0
    for of_text in choices:
        following = first + 1
        for choice in of_text:
            end = following + len(choice) - 1
            places += [first, *range(following, end)]
            labels += choice
            lengths.append(len(choice))
            following = end
        first = following
    # In pieces: float32 copies of all logits at once could take more memory than the model.
    pieces = torch.split(logits, LOGITS_AT_ONCE)
    totals = torch.cat([piece.float().logsumexp(dim=-1) for piece in pieces])
    where = torch.tensor(places, device=logits.device)
    targets = torch.tensor(labels, device=logits.device)
    chosen = logits[where, targets].float() - totals[where]
    runs = iter(torch.split(chosen.cpu(), lengths))
    for index, of_text in zip(indices, choices, strict=True):
        yield index, [next(runs).mean().item() for _ in of_text]


def _padded(
    model: PreTrainedModel, rows: ChoicePrompts, pad: int, budget: int, before_pass: BeforePass
) -> Means:
    is_seq2seq = model.config.is_encoder_decoder
    score = _score_seq2seq if is_seq2seq else _score_causal
    lengths = []
    for prompt, choices in rows:
        copies = 1 if is_seq2seq else len(choices)
        lengths.append(len(prompt) * copies + sum(map(len, choices)))
    with batching.contiguous_head(model):
        for batch in batching.batches_of_tokens(lengths, budget):
            chosen = [rows[index] for index in batch]

            def announce(places: Sequence[int], batch: Sequence[int] = batch) -> None:
                before_pass(list(map(batch.__getitem__, places)))

            means = iter(score(model, chosen, pad, announce).tolist())
            for index, (_, choices) in zip(batch, chosen, strict=True):
                yield index, list(itertools.islice(means, len(choices)))


def _score_causal(
    model: PreTrainedModel, rows: ChoicePrompts, pad: int, announce: BeforePass
) -> Tensor:
    device = model.device
    # Windows and states would see beyond their text in a row: each choice is read with its prompt.
    texts = []
    targets = list[Tokens]()
    for prompt, choices in rows:
        texts += [[*prompt, *choice[:-1]] for choice in choices]
        targets += choices
    labels = pad_left(targets, IGNORED).to(device)
    longest = labels.shape[1]
    ids, real = padded_rows(pad_left, texts, pad, device)
    options: dict[str, object] = {}
    accepted = inspect.signature(model.forward).parameters
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = longest
    if "position_ids" in accepted:
        options["position_ids"] = position_ids(real)
    announce(_owners(rows, device).tolist())
    output = model(input_ids=ids, attention_mask=real, use_cache=False, **options)
    return _mean_log_likelihood(output.logits[:, -longest:], labels)


def _score_seq2seq(
    model: PreTrainedModel, rows: ChoicePrompts, pad: int, announce: BeforePass
) -> Tensor:
    device = model.device
    prompts, real = padded_rows(pad_right, [prompt for prompt, _ in rows], pad, device)
    announce(range(len(rows)))
    encoded = model.get_encoder()(input_ids=prompts, attention_mask=real)
    states = encoded.last_hidden_state
    form = type(encoded)  # some models ask for more of it
    owners = _owners(rows, device)
    start = model.config.decoder_start_token_id
    choices = list(itertools.chain.from_iterable(of_row for _, of_row in rows))
    means = torch.empty(len(choices), device=device)
    # In groups, since padding of a decoder's rows costs as much as tokens.
    for group in _of_similar_length(list(map(len, choices))):
        chosen = [choices[index] for index in group]
        from_row = owners[group]
        inputs = [[start, *choice[:-1]] for choice in chosen]
        decoded, mask = padded_rows(pad_right, inputs, pad, device)
        announce(from_row.tolist())
        logits = model(
            encoder_outputs=form(last_hidden_state=states.index_select(0, from_row)),
            attention_mask=real.index_select(0, from_row),
            decoder_input_ids=decoded,
            decoder_attention_mask=mask,
            use_cache=False,
        ).logits
        means[group] = _mean_log_likelihood(logits, pad_right(chosen, IGNORED).to(device))
    return means


def _of_similar_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Groups of indices, each once; in a group no length is below two thirds of the longest."""
    order = batching.longest_first(lengths)
    group = order[:1]
    for index in order[1:]:
        if 3 * lengths[index] < 2 * lengths[group[0]]:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _owners(rows: ChoicePrompts, device: torch.device) -> Tensor:
    """For every choice the index of its row, [choices]."""
    counts = torch.tensor([len(choices) for _, choices in rows])
    return torch.arange(len(rows)).repeat_interleave(counts).to(device)


def _mean_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """[choices] from logits [choices, longest, vocabulary] and labels [choices, longest]."""
    counted = labels.ne(IGNORED)
    of_vocabulary = logits.float().log_softmax(dim=-1)
    chosen = of_vocabulary.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (chosen * counted).sum(dim=-1) / counted.sum(dim=-1)
