"""The layers of a routed model: linear ones that add their experts' updates.

With w_z the weights of a token, zero for experts that it didn't choose, u the input, W and b the
site's own weight and bias (Muqeeth et al. 2024, section 3, for LoRAs; the rest is ours):

    y₀ = W (u ⊙ (1 + Σ w_z (l_z - 1))) + b                     z: (IA)³ on the input
    y  = y₀ ⊙ (1 + Σ w_z (l_z - 1))                            z: (IA)³ on the output
       + Σ w_z (B_z A_z u + bias_z)                            z: LoRA, scale folded in
       + Σ w_z (U_z f_z(D_z y₀ + b_z) + c_z)                   z: bottleneck adapter

and what other kinds' parts add or multiply by, in the order of the registry of kinds. One softmax
weighs all experts of the site, whatever their kind. LoRAs read the input as it came and
adapters the output before anything is added to it, which is what each was trained on; every expert
adds its own change, weighted, and none reads another's. (Scaling the input is the exception: to
leave it out for the others would take a second product with W.) With one expert of weight 1 this is
that expert alone.

First their stacks: the modules of all experts at one site, in a few tensors, part by part. E
experts, r rank or another size of one's own, n inputs, d outputs of the site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..errors import RoutingError
from ..experts import kinds
from ..experts.lora import LoraStack
from ..experts.pool import Pool
from ..experts.stack import Part, Stacked, widened
from ..sites import Site
from .context import Acting, RoutingContext, Tails, uncompiled
from .kernels import choose_kernel, one_call
from .recording import watches_over
from .routers.router import RouterAtSite, RoutingDecision

Member = tuple[type[Part], Mapping[str, Tensor | None]]  # an expert's part, its tensors by field


def parts_of_kinds() -> dict[str, type[Any]]:
    """The parts of stacks that all kinds declare, by name."""
    return {part.name: part for kind in kinds().values() for part in kind.stacked}


def renumbered(left: Tensor, count: int) -> Tensor:
    """The place of each of `count` rows among those that are `left` (indices, in order), or -1."""
    places = torch.full((count,), -1, device=left.device)
    places[left] = torch.arange(len(left), device=left.device)
    return places


@dataclass(frozen=True)
class SiteStack:
    """All experts' modules at one site: the parts that are there, by name.

    Only the experts that act at the site are in it, each in one part; `experts` holds their indices
    in the pool, [E].
    """

    experts: Tensor  # [E] int64
    parts: Mapping[str, Part] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but `experts`, by their names in saved models."""
        return {name: t for part in self.parts.values() for name, t in part.tensors().items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], experts: Tensor) -> SiteStack:
        parts = {}
        for name, part in parts_of_kinds().items():
            names = part.names().items()
            fields: dict[str, Any] = {f: tensors[key] for f, key in names if key in tensors}
            if fields:
                parts[name] = part(**fields)
        return cls(experts, parts)

    def to(self, device: torch.device, dtype: torch.dtype) -> SiteStack:
        """The same on `device`; in `dtype`, but for indices and what belongs in float32."""
        forms = self._forms()
        types = {n: dtype if forms[n].dtype == "model" else forms[n].types[0] for n in forms}
        moved = {name: tensor.to(device, types[name]) for name, tensor in self.tensors().items()}
        return SiteStack.of(moved, self.experts.to(device))

    @property
    def dtype(self) -> torch.dtype:
        """The model's type, which most of the tensors have; float32 with scalings only."""
        tensors, forms = self.tensors(), self._forms()
        models = (tensors[name] for name in tensors if forms[name].dtype == "model")
        return next(models, torch.empty(0)).dtype

    def _forms(self) -> dict[str, Stacked]:
        parts = self.parts.values()
        return {part.names()[name]: form for part in parts for name, form in part.forms().items()}

    def rows(self) -> dict[str, Tensor]:
        every = torch.arange(len(self.experts), device=self.experts.device)
        return {
            name: every if part.rows is None else part.rows for name, part in self.parts.items()
        }

    def members(self) -> list[Member]:
        """The part of each expert and its tensors there, no wider than they need to be."""
        members: dict[int, Member] = {}
        for name, rows in self.rows().items():
            part, forms = self.parts[name], self.parts[name].forms()
            fields = {f: t for f in forms if f != "rows" and (t := getattr(part, f)) is not None}
            widths = [0] * len(rows)
            if sized := [field for field in fields if forms[field].is_filled_up]:
                # Ranks of zeros are other experts': composing anew would not have them.
                used = [fields[f].reshape(*fields[f].shape[:2], -1).any(dim=-1) for f in sized]
                places = torch.arange(1, used[0].shape[1] + 1, device=rows.device)
                most = (torch.stack(used).any(dim=0) * places).amax(dim=1).clamp(min=1)
                widths = most.tolist()
            for place, row in enumerate(rows.tolist()):
                own = {f: t[place] for f, t in fields.items()}
                own |= {f: own[f][: widths[place]] for f in sized}
                kept = {f: t for f, t in own.items() if not forms[f].optional or t.any()}
                members[row] = type(part), kept
        return [members[row] for row in range(len(self.experts))]

    @property
    def plain_lora(self) -> LoraStack | None:
        """The LoRAs, where there is nothing else here, no biases either."""
        lora = self.parts.get("lora")
        is_alone = isinstance(lora, LoraStack) and lora.rows is None and lora.B_bias is None
        return lora if is_alone else None  # type: ignore[return-value]


def stacked(members: Sequence[Member], experts: Tensor, dtype: torch.dtype) -> SiteStack:
    """The stack of one site's `members`, of these `experts`, on their device."""
    by_part: dict[str, dict[int, Mapping[str, Tensor | None]]] = {}
    for row, (part, tensors) in enumerate(members):
        by_part.setdefault(part.name, {})[row] = tensors
    parts = {
        name: part.of(by_part[name], dtype, experts.device, len(members))
        for name, part in parts_of_kinds().items()
        if name in by_part
    }
    return SiteStack(experts, parts)


def stack_of(pool: Pool, site: str, dtype: torch.dtype, device: torch.device) -> SiteStack:
    """The stack of the pool's experts that have a module at `site`."""
    present = [z for z, expert in enumerate(pool.experts) if site in expert.modules]
    members, by_kind = list[Member](), {kind.name: kind.stacked for kind in kinds().values()}
    for module in (pool.experts[z].modules[site] for z in present):
        part = next(part for part in by_kind[module.kind] if part.stacks(module))
        members.append((part, part.row(module)))
    return stacked(members, torch.tensor(present, device=device), dtype)


SQUARED = torch.finfo(torch.float32).max ** 0.5  # what a norm after the layer can still square


@torch.no_grad()
def check_numbers(stack: SiteStack, where: str, names: Sequence[str]) -> None:
    """Raise RoutingError for an expert whose update at the site `where` can't be computed with.

    Its numbers, the product of its factors and their squares must be finite. `names`: the pool's.
    """
    most = min(torch.finfo(stack.dtype).max, SQUARED)
    for name, part in stack.parts.items():
        factors = [getattr(part, field) for field in part.compared if len(part.compared) > 1]
        tensors = [t for t in part.tensors().values() if t.is_floating_point()]
        bounds = [_lengths(t) for t in tensors if all(t is not factor for factor in factors)]
        if factors:  # no number of B A is above |A| |B|
            bounds.append(_lengths(factors[0]) * _lengths(factors[1]))
        bound = torch.stack(bounds).amax(dim=0)
        for row in (~(bound <= most)).nonzero().flatten().tolist():  # so is NaN
            expert = names[int(stack.experts[stack.rows()[name][row]])]
            raise RoutingError(
                f"Expert {expert!r} at {where}: its update may have numbers of {bound[row]:.1e}, "
                f"more than a layer in {stack.dtype} can use ({most:.1e}); leave it out "
                f"(--leave-out {expert})."
            )


def _lengths(rows: Tensor) -> Tensor:
    """The norm of each expert's numbers, float32 [E]: none of them, nor of a product, is larger."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=wide)
    return lengths.float()


class SitePart(NamedTuple):
    """Some experts at one site: their stack, and their rows of the router's tensors there.

    Saved models grow and shrink by these alone.
    """

    stack: SiteStack
    state: Mapping[str, Tensor]


def joined_parts(one: SitePart, other: SitePart) -> SitePart:
    """All experts of both, in order; the router's tensors as the first has them."""
    experts = torch.cat([one.stack.experts, other.stack.experts])
    members = [*one.stack.members(), *other.stack.members()]
    state = {}
    for name, rows in one.state.items():  # with zeros where ranks differ
        both = [rows, other.state[name].to(rows)]
        width = max(each.shape[1] for each in both) if rows.dim() > 1 else 0
        state[name] = torch.cat([widened(each, width) if width else each for each in both])
    return SitePart(stacked(members, experts, one.stack.dtype), state)


def kept_part(part: SitePart, place: Tensor) -> SitePart | None:
    """The part without experts whose `place` [pool] is -1, numbered again; None if none is left."""
    experts = place[part.stack.experts]
    rows = (experts >= 0).nonzero().flatten()
    if not len(rows):
        return None
    members = part.stack.members()
    staying = [members[row] for row in rows.tolist()]
    stack = stacked(staying, experts[rows], part.stack.dtype)
    return SitePart(stack, {name: tensor[rows] for name, tensor in part.state.items()})


# The layers.


class RoutedLayer(nn.Module):
    """The frame of the layers of a routed model: a site, its experts, and the base's layer there.

    `experts` [E] are the pool's indices of the experts that act here. The base's layer, `base`, is
    no submodule: its parameters are this layer's own, under their own names. So state dicts are
    those of the base, and code that moves, offloads or trains parameters (accelerate, for one)
    finds them where they were.
    """

    base: Any
    experts: Tensor

    def __init__(self, base: nn.Module, site: Site, experts: Tensor) -> None:
        super().__init__()
        # Past nn.Module, which would make it a submodule and change every name in state dicts.
        self.__dict__["base"] = base
        # The very dictionary, so that whoever replaces a parameter replaces the base's too.
        self._parameters = base._parameters
        for name, child in base.named_children():
            self.add_module(name, child)
        self.site = site
        self.in_features, self.out_features = site.in_features, site.out_features
        self.register_buffer("experts", experts, persistent=False)

    def extra_repr(self) -> str:
        return repr(self.base)

    def train(self, mode: bool = True) -> RoutedLayer:
        self.base.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutedLayer:
        self.base._apply(fn, recurse=False)  # layers of other makes have buffers too
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.base._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.base._load_from_state_dict(*arguments)


class RoutedLinear(RoutedLayer):
    """A linear layer (of any make) with experts of any kinds and a router that chooses among them.

    Experts and router are buffers that stay out of the model's state dict; those of the stack have
    the names that `SiteStack.tensors` gives them.
    """

    at_site: RouterAtSite
    A: Tensor
    B: Tensor

    def __init__(
        self,
        base: nn.Module,
        site: Site,
        stack: SiteStack,
        at_site: RouterAtSite,
        tails: Tails = (),
    ) -> None:
        """`tails` are how many of a prompt's last tokens each expert acts on; none: all tokens."""
        super().__init__(base, site, stack.experts)
        self.at_site = at_site
        self.kernel = at_site.router.kernel
        self.context: RoutingContext | None = at_site.context
        self.tails = tails if any(tails) else ()
        self.part_types = {n: (type(part), part.names()) for n, part in stack.parts.items()}
        for name, tensor in stack.tensors().items():
            # Kernels take addresses, and trust that there are no gaps.
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.is_plain = stack.plain_lora is not None
        if not self.is_plain:
            for part, rows in stack.rows().items():
                place = renumbered(rows, len(stack.experts))
                self.register_buffer(f"{part}_place", place, persistent=False)
        fused = self.kernel in ("auto", "native", "triton")
        self.one_call = self.is_plain and fused and bool(at_site.router.fused)

    @property
    def stack(self) -> SiteStack:
        return SiteStack(self.experts, self._parts())

    def _parts(self) -> dict[str, Any]:
        return {
            name: part(**{field: getattr(self, key, None) for field, key in names.items()})
            for name, (part, names) in self.part_types.items()
        }

    @uncompiled
    def _acting(self, device: torch.device) -> Acting:
        acting = self.context.acting_at(self.tails) if self.context else Acting()
        if watches_over(self, self.site):  # who want to see every token
            acting = acting._replace(places=None)
        return Acting(*(None if each is None else each.to(device) for each in acting))

    def choose(self, u: Tensor, acting: Acting | None = None) -> RoutingDecision:
        """The experts of each token of u [.., n] and their weights; calls the watches back.

        Where few tokens have any that act, of these alone.
        """
        acting = acting or (self._acting(u.device) if self.tails else Acting())
        tokens, places = u.reshape(-1, u.shape[-1]), acting.places
        if places is not None and self.at_site.router.by_token:
            # Not one token more: gates of many experts cost as much as the rest of the layer.
            few: RoutingDecision = self.at_site(tokens[places], acting.mask_there)
            return few
        decision: RoutingDecision = self.at_site(tokens, acting.mask)
        if places is not None:
            return RoutingDecision(decision.experts[places], decision.weights[places])
        if watches := watches_over(self, self.site):
            chosen = self.experts[decision.experts]
            at_site = self.at_site
            for watch in watches:
                watch.tell(
                    self.site, u, chosen, decision.weights, lambda: at_site.distribution(tokens)
                )
        return decision

    def forward(self, u: Tensor) -> Tensor:
        """[.., n] to [.., d]; the formula above."""
        acting = self._acting(u.device) if self.tails else Acting()
        if not self.is_plain:
            return self._all_parts(u, acting)
        y: Tensor = self.base(u)
        places, tokens, rows = acting.places, u, y
        if places is not None:
            if not len(places):
                return y
            flat = y.reshape(-1, y.shape[-1])
            tokens, rows = u.reshape(-1, u.shape[-1])[places], flat[places]
        acts_alike = (acting.mask if places is None else acting.mask_there) is None
        if acts_alike and self.one_call and self._added_in_one_call(rows, tokens):
            return y if places is None else flat.index_copy_(0, places, rows).view(y.shape)
        decision = self.choose(u, acting)
        inputs = tokens.reshape(-1, tokens.shape[-1]).to(self.A.dtype)
        delta = self._product(inputs, decision.experts, decision.weights, self.A, self.B)
        if places is None:
            return y + delta.view(y.shape).to(y.dtype)
        add = flat.index_add if y.requires_grad else flat.index_add_
        return add(0, places, delta.to(y.dtype)).view(y.shape)

    def _added_in_one_call(self, y: Tensor, u: Tensor) -> bool:
        at_site = self.at_site
        k = at_site.k
        stacked = at_site.vectors, self.A, self.B
        if not y.is_contiguous():
            return False
        add_routed = one_call(self.kernel, y, u, stacked, k)
        # One call leaves no decision to show, so a watched layer goes the longer way.
        if add_routed is None or watches_over(self, self.site):
            return False
        add_routed(y, u, stacked, k, at_site.eps)
        return True

    def _all_parts(self, u: Tensor, acting: Acting) -> Tensor:
        parts, decision = self._parts(), self.choose(u, acting._replace(places=None))
        chosen: dict[str, tuple[Tensor, Tensor]] = {}
        for name in parts:
            place = getattr(self, f"{name}_place")[decision.experts]
            # An expert of another part gets row 0 with weight 0: shapes stay static.
            chosen[name] = place.clamp(min=0), decision.weights * (place >= 0)
        scaled = u
        for name, part in parts.items():
            factor = part.input_factor(*chosen[name])
            if factor is not None:
                scaled = (scaled * factor.view(u.shape)).to(u.dtype)
        first: Tensor = self.base(scaled)
        y0 = first.reshape(-1, first.shape[-1])
        y = y0
        for name, part in parts.items():
            factor = part.output_factor(*chosen[name])
            if factor is not None:
                y = (y * factor).to(y0.dtype)
        tokens = u.reshape(-1, u.shape[-1])
        for name, part in parts.items():
            added = part.added(tokens, y0, *chosen[name], self._product)
            if added is not None:
                y = y + added.to(y.dtype)
        return y.view(first.shape)

    def _product(
        self, tokens: Tensor, experts: Tensor, weights: Tensor, A: Tensor, B: Tensor
    ) -> Tensor:
        kernel = choose_kernel(self.kernel, tokens, experts, A, B)
        return kernel(tokens, experts, weights, A, B)


class FoldedLinear(RoutedLayer):
    """A linear layer with the mean of its experts' updates inside its weight, rounded once."""

    folded: Tensor

    def __init__(
        self, base: nn.Module, site: Site, folded: Tensor, experts: Tensor, pool_size: int
    ) -> None:
        super().__init__(base, site, experts)
        self.weight_of_each = 1 / pool_size
        self.register_buffer("folded", folded, persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        if watches := watches_over(self, self.site):
            experts = self.experts.expand(u[..., 0].numel(), -1)
            equal = torch.full(experts.shape, self.weight_of_each, device=u.device)
            for watch in watches:
                watch.tell(self.site, u, experts, equal, lambda: equal)
        return functional.linear(u, self.folded, self.base.bias)


def is_cheaper_folded(base: nn.Module, stack: LoraStack) -> bool:
    """True if the experts have more numbers than the weight that their mean can be added to."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    return has_plain_weight(base) and stack.A.numel() + stack.B.numel() > weight.numel()


def has_plain_weight(base: nn.Module) -> bool:
    """True for a layer that only multiplies by its weight, which is not packed or offloaded."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    # Exactly these: subclasses, quantised ones for instance, may do more than multiply.
    is_linear = type(base) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter
    return is_linear and not weight.is_meta


def matrix_of(base: nn.Module) -> Tensor:
    """The weight as [d, n]."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    # GPT-2's Conv1D keeps its weight as [n, d].
    return weight.T if isinstance(base, Conv1D) else weight


@torch.no_grad()
def folded_weight(base: nn.Module, stack: LoraStack, pool_size: int) -> Tensor:
    """W plus the mean of all B A, [d, n], in the dtype of W, summed in float32."""
    weight = matrix_of(base)
    A, B = stack.A.float().flatten(0, 1), stack.B.float().flatten(0, 1)  # [E r, n], [E r, d]
    return (weight.float() + B.T @ A / pool_size).to(weight.dtype)
