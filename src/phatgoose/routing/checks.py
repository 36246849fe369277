"""Checks tensors of routed sites before layers and kernels use them.

Kernels take addresses and trust sizes, and a saved file may come from anyone.
Letters as in docs/format.md: E experts of a site, n inputs, d outputs; each part of a
stack has its own letters besides, such as r for the rank of LoRAs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RoutingError
from ..experts.kind import INDICES, Part
from ..sites import FLOATS, Site
from .stacks import SiteStack, declared

OWNERS = "owners"  # among a lookup's tensors, whose experts its rows are
UNIT = ("embeddings", "centroids")  # and which of them are unit vectors, or 0
LONGEST = 1.01  # of unit vectors that are rounded
SQUARED = torch.finfo(torch.float32).max ** 0.5  # what a norm after the layer can still square


@dataclass(frozen=True)
class Form:
    """What a tensor looks like: a letter for each of its sizes, and the types it may have."""

    letters: str
    types: tuple[torch.dtype, ...] = FLOATS


def tensors_of_sites() -> dict[str, Form]:
    """The form of each tensor that a saved model may have at a site, but for its router's."""
    held = {name: Form(each.sizes, each.types) for name, each in declared().tensors.items()}
    return {"experts": Form("E", INDICES), "folded": Form("dn"), **held}


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

    `held` are named as in `tensors_of_sites`, or in `form`: the router's, all of which must be
    there unless the experts are folded. Indices of experts are below `pool_size`. Raises
    RoutingError that begins with `where`, naming the tensor, what was got and what was wanted.
    """
    if "experts" not in held:
        raise RoutingError(f"{where}: there are {_named(held)}, but no list of experts.")
    missing = [name for name in form if name not in held and "folded" not in held]
    if missing:
        raise RoutingError(f"{where}: there are stacks, but no {missing[0]} for the router.")
    forms = tensors_of_sites()
    if clash := sorted(form.keys() & forms.keys()):
        raise RoutingError(f"{where}: a router and a kind both have tensors called {clash[0]}.")
    forms |= {name: Form(letters) for name, letters in form.items()}
    if unknown := sorted(held.keys() - forms.keys()):
        raise RoutingError(
            f"{where}: there are {', '.join(unknown)}, of no router or kind of expert here."
        )
    others = {name: tensor for name, tensor in held.items() if name not in declared().tensors}
    found = _sizes_of(where, others, forms, sizes)
    for part in declared().parts.values():
        own = {each.name: held[each.name] for each in part.held.values() if each.name in held}
        known = {letter: found[letter] for letter in "nd" if letter in found}
        own_sizes = _sizes_of(where, own, forms, known)
        found |= {letter: own_sizes[letter] for letter in "nd" if letter in own_sizes}
    _check_range(where, "experts", held["experts"], pool_size, ascending=True)
    _check_parts(where, held)
    _check_numbers(where, held)
    return found


def check_lookup(
    where: str, held: Mapping[str, Tensor], pool_size: int, form: Mapping[str, str]
) -> None:
    """As `check_tensors`, of the tensors of a prompt router (`ByPrompt.prompt_form`)."""
    if held.keys() != form.keys():
        raise RoutingError(f"{where}: there are {_named(held)}; wanted {' and '.join(form)}.")
    forms = {name: Form(form[name], INDICES if name == OWNERS else FLOATS) for name in form}
    _sizes_of(where, held, forms, {"E": pool_size})
    if OWNERS in held:
        _check_range(where, OWNERS, held[OWNERS], pool_size)
    _check_numbers(where, held)


@torch.no_grad()
def check_numbers(stack: SiteStack, where: str, names: Sequence[str]) -> None:
    """Raise RoutingError for an expert whose update at the site `where` can't be computed with.

    Its numbers, the product of its factors and their squares must be finite. `names`: the pool's.
    """
    most = min(torch.finfo(stack.dtype).max, SQUARED)
    for name, part in stack.parts.items():
        factors = [getattr(part, field) for field in part.compared if len(part.compared) > 1]
        alone = [t for t in part.tensors().values() if all(t is not factor for factor in factors)]
        alone = [tensor for tensor in alone if tensor.is_floating_point()]
        bounds = [_lengths(tensor) for tensor in alone]
        if factors:
            # No number of B A is above |A| |B|: products are only computed where this bound is too
            # high.
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
    """Raise RoutingError if a folded weight has overflowed."""
    if not bool(folded.isfinite().all()):
        raise RoutingError(
            f"The mean of all experts at {where}, added to the base's weight, is more than "
            f"{folded.dtype} can hold; load the base in another type (--dtype)."
        )


def _sizes_of(
    where: str, held: Mapping[str, Tensor], forms: Mapping[str, Form], sizes: Mapping[str, int]
) -> dict[str, int]:
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
    rows: list[Tensor] = []
    for part in declared().parts.values():
        present = {field: each for field, each in part.held.items() if each.name in held}
        if not present:
            continue
        first = next(iter(present.values())).name
        for field, each in part.held.items():
            if not each.optional and field not in present:
                raise RoutingError(f"{where}: there is {first}, but no {each.name}.")
        made: Part = part(**{field: held[each.name] for field, each in present.items()})
        if problem := made.problem():
            raise RoutingError(f"{where}: {problem}.")
        own = made.rows
        rows.append(torch.arange(len(held[first])) if own is None else own.cpu())
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
    least, most = (int(end) for end in indices.aminmax())
    if least < 0 or most >= count:
        raise RoutingError(
            f"{where}: {name} has numbers from {least} to {most}; wanted 0 to {count - 1}."
        )
    if ascending and not bool((indices.diff() > 0).all()):
        raise RoutingError(f"{where}: {name} must be in order, each of them once.")


def _check_numbers(where: str, held: Mapping[str, Tensor]) -> None:
    for name, tensor in held.items():
        if name.endswith(".rest") and bool((tensor < 0).any()):
            raise RoutingError(f"{where}: {name} has variances below 0.")
        if name == "spread" and not bool((tensor > 0).all()):
            raise RoutingError(f"{where}: {name} has numbers of 0 or less; wanted deviations.")
        if name in UNIT and bool((tensor.float().norm(dim=-1) > LONGEST).any()):
            raise RoutingError(f"{where}: {name} has rows that are longer than 1.")


def _named(names: Iterable[str]) -> str:
    return ", ".join(names) or "no tensors"
