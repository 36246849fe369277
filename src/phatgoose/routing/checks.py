"""Checks that the tensors of a routed site are what layers, routers and kernels take them for.

Every stack that becomes a layer is checked against its site, and every file of a routed model
against the others: kernels get addresses and trust sizes, and a file may come from anywhere.
Letters as in docs/format.md: E experts of a site, n inputs, v = n + 1, d outputs, r rank, m size of
a bottleneck; P, I, O, N its experts that are LoRAs, scale inputs, scale outputs, are bottlenecks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.sites import Site
from ..config import ACTIVATIONS
from ..errors import RoutingError
from ..files.tensor_file import FLOATS
from .stacks import PARTS, SiteStack

LARGEST = 127  # of whole numbers in int8
SCALES = {"A": "A_scale", "B": "B_scale"}
INDICES, FACTORS = (torch.int64,), (*FLOATS, torch.int8)
OWNERS = "owners"  # among a lookup's tensors, whose experts its rows are
UNIT = ("embeddings", "centroids")  # and which of them are unit vectors, or 0
LONGEST = 1.01  # of unit vectors that are rounded
PRODUCTS = {"lora": ("A", "B"), "bottleneck": ("down", "up")}  # fields that are multiplied
SQUARED = torch.finfo(torch.float32).max ** 0.5  # what a norm after the layer can still square
SHARED = "ndcbhfg"  # letters that stand for one size in all files


@dataclass(frozen=True)
class Form:
    """What a tensor looks like: a letter for each of its sizes, and the types it may have."""

    letters: str
    types: tuple[torch.dtype, ...] = FLOATS


SITE_TENSORS = {
    "experts": Form("E", INDICES),
    "folded": Form("dn"),
    "A": Form("Prn", FACTORS),
    "A_scale": Form("Pr"),
    "B": Form("Prd", FACTORS),
    "B_scale": Form("Pr"),
    "B_bias": Form("Pd"),
    "lora_rows": Form("P", INDICES),
    "input_deltas": Form("In"),
    "input_rows": Form("I", INDICES),
    "output_deltas": Form("Od"),
    "output_rows": Form("O", INDICES),
    "down": Form("Nmd"),
    "down_bias": Form("Nm"),
    "up": Form("Nmd"),
    "up_bias": Form("Nd"),
    "activations": Form("N", INDICES),
    "bottleneck_rows": Form("N", INDICES),
}


def check_site(
    stack: SiteStack,
    site: Site,
    pool_size: int,
    state: Mapping[str, Tensor],
    form: Mapping[str, str],
) -> None:
    """Raise RoutingError unless `stack`, of experts of a pool, can act at `site`.

    `state` are the router's tensors there, which `form` gives letters for (`Router.form`).
    """
    where = f"Experts at {site.name}"
    held = {"experts": stack.experts, **stack.tensors(), **state}
    sizes = {"n": site.in_features, "d": site.out_features}
    check_tensors(where, held, pool_size, sizes, form)


def check_tensors(
    where: str,
    held: Mapping[str, Tensor],
    pool_size: int,
    sizes: Mapping[str, int],
    form: Mapping[str, str],
) -> dict[str, int]:
    """The sizes of one site's tensors, by letter, which belong together and to known `sizes`.

    `held` are named as in SITE_TENSORS, or in `form`: the router's, all of which must be there
    unless the experts are folded. Indices of experts are below `pool_size`. Only sizes that all
    files share come back. Raises RoutingError that begins with `where`, naming the tensor, what was
    got and what was wanted.
    """
    if "experts" not in held:
        raise RoutingError(f"{where}: there are {_named(held)}, but no list of experts.")
    missing = [name for name in form if name not in held and "folded" not in held]
    if missing:
        raise RoutingError(f"{where}: there are stacks, but no {missing[0]} for the router.")
    forms = {**SITE_TENSORS, **{name: Form(letters) for name, letters in form.items()}}
    unknown = sorted(held.keys() - forms.keys())
    for part, kind in PARTS.items():
        if strange := sorted(set(unknown) & set(kind.names.values())):
            raise RoutingError(
                f"{where}: there are {', '.join(strange)} of experts of the kind {part!r}, whose "
                f"sizes and types nothing here can check (SITE_TENSORS)."
            )
    if unknown:
        raise RoutingError(f"{where}: there are {', '.join(unknown)}, which no router wants.")
    found = _sizes_of(where, held, forms, sizes)
    _check_range(where, "experts", held["experts"], pool_size, ascending=True)
    _check_parts(where, held)
    if "activations" in held:
        _check_range(where, "activations", held["activations"], len(ACTIVATIONS))
    for factor, scale in SCALES.items():
        if (scale in held) != (factor in held and held[factor].dtype == torch.int8):
            raise RoutingError(f"{where}: {scale} belongs to {factor} in int8, and to that only.")
        if scale in held:
            _check_scale(where, scale, held[scale])
    _check_numbers(where, held)
    return {letter: size for letter, size in found.items() if letter in SHARED}


def check_lookup(
    where: str,
    held: Mapping[str, Tensor],
    pool_size: int,
    sizes: Mapping[str, int],
    form: Mapping[str, str],
) -> dict[str, int]:
    """As `check_tensors`, of the tensors of a prompt router (`ByPrompt.prompt_form`)."""
    if held.keys() != form.keys():
        raise RoutingError(f"{where}: there are {_named(held)}; wanted {' and '.join(form)}.")
    forms = {name: Form(form[name], INDICES if name == OWNERS else FLOATS) for name in form}
    found = _sizes_of(where, held, forms, {**sizes, "E": pool_size})
    if OWNERS in held:
        _check_range(where, OWNERS, held[OWNERS], pool_size)
    _check_numbers(where, held)
    return {letter: size for letter, size in found.items() if letter in SHARED}


@torch.no_grad()
def check_numbers(stack: SiteStack, where: str, names: Sequence[str]) -> None:
    """Raise RoutingError for an expert whose update at the site `where` can't be computed with.

    Every number of it, and of the product of its factors, must be one of the stack's type, scales
    included, and one that float32 can square: a norm squares it in the next layer. `names` are
    those of the pool's experts.
    """
    most = min(torch.finfo(stack.dtype).max, SQUARED)
    for name, part in stack.parts.items():
        factors = [getattr(part, field) for field in PRODUCTS.get(name, ())]
        alone = [t for t in part.tensors().values() if all(t is not factor for factor in factors)]
        alone = [tensor for tensor in alone if tensor.is_floating_point()]
        bounds = [_lengths(tensor) for tensor in alone]
        if factors:
            bounds.append(_lengths(factors[0]) * _lengths(factors[1]))
        doubtful = ~(torch.stack(bounds) <= most).all(dim=0)  # so is NaN
        for row in doubtful.nonzero().flatten().tolist():
            found = [tensor[row] for tensor in alone]
            if factors:
                found.append(factors[1][row].double().T @ factors[0][row].double())
            largest = max(float(t.double().abs().nan_to_num(torch.inf).max()) for t in found)
            if largest > most:
                expert = names[int(stack.experts[stack.rows()[name][row]])]
                raise RoutingError(
                    f"Expert {expert!r} at {where}: its update has numbers of {largest:.1e}, more "
                    f"than a layer in {stack.dtype} can use ({most:.1e}); leave it out "
                    f"(--leave-out {expert}), or train it again."
                )


def _lengths(rows: Tensor) -> Tensor:
    """The norm of each expert's numbers, float32 [E]: none of them, nor of a product, is larger."""
    lengths: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float32)
    return lengths


def check_folded(folded: Tensor, where: str) -> None:
    """Raise RoutingError unless a weight with the mean of all experts inside is finite."""
    if not bool(folded.isfinite().all()):
        raise RoutingError(
            f"The mean of all experts at {where}, added to the base's weight, is more than "
            f"{folded.dtype} can hold; load the base in another type (--dtype)."
        )


def _sizes_of(
    where: str, held: Mapping[str, Tensor], forms: Mapping[str, Form], sizes: Mapping[str, int]
) -> dict[str, int]:
    """The size of each letter, which is the same in all tensors and never 0."""
    found = dict(sizes)
    for name, tensor in held.items():
        form = forms[name]
        got = dict(zip(form.letters, tensor.shape, strict=False))
        fits = tensor.dim() == len(form.letters) and 0 not in tensor.shape
        known = {letter: found[letter] for letter in form.letters if letter in found}
        if not fits or tensor.dtype not in form.types or known.items() - got.items():
            wanted = ", ".join(f"{x} = {known[x]}" if x in known else x for x in form.letters)
            raise RoutingError(
                f"{where}: {name} has shape {list(tensor.shape)} and type {tensor.dtype}; wanted "
                f"[{wanted}] in {' or '.join(str(kind) for kind in form.types)}."
            )
        found |= got
    return found


def _check_parts(where: str, held: Mapping[str, Tensor]) -> None:
    """Parts are whole, and each expert is in one part once; or all are folded into one matrix."""
    rows: list[Tensor] = []
    for part in PARTS.values():
        present = [name for name in part.names.values() if name in held]
        optional = [part.names[field] for field in part.optional]
        missing = [name for name in part.names.values() if name not in (*present, *optional)]
        if present and missing:
            raise RoutingError(f"{where}: there is {present[0]}, but no {missing[0]}.")
        if present:
            own = held.get(part.names["rows"])
            rows.append(torch.arange(held["A"].shape[0]) if own is None else own.cpu())
    E = held["experts"].shape[0]
    if "folded" in held and not rows:
        return
    every = torch.cat(rows).sort().values if rows else torch.empty(0)
    if "folded" in held or not torch.equal(every, torch.arange(E)):
        raise RoutingError(
            f"{where}: {_named(held)} are not one module for each of the {E} experts there."
        )


def _check_range(
    where: str, name: str, indices: Tensor, count: int, *, ascending: bool = False
) -> None:
    """Raise RoutingError unless all `indices` are from 0 to below `count`, each above the last."""
    least, most = (int(end) for end in indices.aminmax())
    if least < 0 or most >= count:
        raise RoutingError(
            f"{where}: {name} has numbers from {least} to {most}; wanted 0 to {count - 1}."
        )
    if ascending and not bool((indices.diff() > 0).all()):
        raise RoutingError(f"{where}: {name} must be in order, each of them once.")


def _check_scale(where: str, name: str, scale: Tensor) -> None:
    """Raise RoutingError unless numbers of int8 times `scale` are finite."""
    least, most = scale.aminmax()
    if least < 0 or most > torch.finfo(torch.float32).max / LARGEST:
        raise RoutingError(f"{where}: {name} has numbers from {least} to {most}, no scale of rows.")


def _check_numbers(where: str, held: Mapping[str, Tensor]) -> None:
    """Raise RoutingError where a variance is below 0, a deviation 0, or a unit vector longer."""
    for name, tensor in held.items():
        if name.endswith(".rest") and bool((tensor < 0).any()):
            raise RoutingError(f"{where}: {name} has variances below 0.")
        if name == "spread" and not bool((tensor > 0).all()):
            raise RoutingError(f"{where}: {name} has numbers of 0 or less; wanted deviations.")
        if name in UNIT and bool((tensor.float().norm(dim=-1) > LONGEST).any()):
            raise RoutingError(f"{where}: {name} has rows that are longer than 1.")


def _named(names: Iterable[str]) -> str:
    return ", ".join(names) or "no tensors"
