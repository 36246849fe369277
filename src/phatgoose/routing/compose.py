"""Composing: a base model and a pool become one transformers model that routes every token.

What a routed model is made of, how it is saved and loaded (`saved` has the folder's format), and
opening any place: a routed model's folder, a pool, a base.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.identity import (
    Base,
    BaseReference,
    check_base,
    fingerprint,
    quantisation,
    surely_differs,
)
from ..base.loading import check_heeds_masks, load_base
from ..config import MODEL_TYPE, Routing, RoutingSettings, from_mapping
from ..errors import ConfigError, RoutingError, WrongBaseError
from ..experts.expert import tail_of
from ..experts.hub import HubReference
from ..experts.kind import check_fit, check_parts
from ..experts.pool import Pool
from ..files import new_directory, prefetch, read_json, write_text, writing
from ..names import ROUTED_INFO, closest_beside
from ..sites import FLOATS, ROUTED, Site, dtype_at, find_sites, replace_module
from ..tasks.task import Chat, Example
from .context import RoutingContext
from .conversation import ChatTexts
from .kernels import AUTO as ANY_KERNEL
from .layers import (
    FoldedLinear,
    RoutedLayer,
    RoutedLinear,
    SitePart,
    SiteStack,
    check_numbers,
    folded_weight,
    is_cheaper_folded,
    stack_of,
)
from .routers.auto import BY_PROMPT, first_allowed, resolved
from .routers.fixed import read_scores
from .routers.prompt import ByPrompt, PromptChooser, Tables
from .routers.registry import AUTO, WEIGHTS, written_mixture
from .routers.router import Router, RouterAtSite, Scores, check_routing, check_served, router_of
from .saved import FORMAT_VERSION, read_saved, shareable, write_saved

CONFIG = "config.json"  # of transformers
INSTALLED = (ROUTED, "tokenizer", "save_pretrained", "generate", "init_continuous_batching")
ARGUMENTS = ("scores", "weights")  # of `compose`, beside routing settings
TURNED = ("fsmt", "led", "xlnet")  # whose layers take [tokens, rows]
READ_AT_ONCE = 2**26  # bytes of experts' files in memory, beside the stacks made of them


def resolve_base(
    base: Base | PreTrainedModel | str | Path | None, wanted: BaseReference, dtype: str = "auto"
) -> Base:
    """The base to route in: a name, loaded in `dtype`, a `Base`, a model, or None for `wanted`.

    A transformers model brings no tokenizer. Raises WrongBaseError where it isn't `wanted`,
    BaseModelError when it reads padding.
    """
    if isinstance(base, PreTrainedModel):
        check_heeds_masks(base.config)
        marks, no_tokenizer = fingerprint(base), cast(PreTrainedTokenizerBase, None)
        base = Base(base, no_tokenizer, wanted.id, wanted.revision, marks)
    elif not isinstance(base, Base):
        revision = None if base else wanted.revision
        base = load_base(base or wanted.id, revision=revision, dtype=dtype)
    kinds = quantisation(base.model)
    if kinds and wanted.fingerprint and base.fingerprint != wanted.fingerprint:
        warnings.warn(
            f"The base model {base.id!r} is quantised ({kinds}), so its weights can't be "
            f"compared with the experts' fingerprint; taking it on trust.",
            stacklevel=3,
        )
        base = replace(base, fingerprint=wanted.fingerprint)
    check_base(wanted, base.reference)
    return base


class Composition:
    """What a routed model is made of; found on it as `model.phatgoose`.

    `experts` are the pool's names in order, `records` their places and hashes; `layers` the routed
    layers by site. `tails` are how many of a prompt's last tokens each expert acts on, None for
    all tokens. `chooser` chooses for whole prompts, None where experts are chosen for
    every token. `context` has its choice for the present batch, and where in it those experts act
    that act from a prompt's end on; None without either.
    """

    def __init__(
        self,
        base: Base,
        router: Router,
        experts: tuple[str, ...],
        records: list[dict[str, Any]],
        tables: Tables | None,
    ) -> None:
        """`tables` are those of a router by prompt.

        Raises RoutingError for experts that act from a prompt's end on in an encoder-decoder.
        """
        self.tails = tuple(map(tail_of, records))
        late = [name for name, tail in zip(experts, self.tails, strict=True) if tail]
        if late and base.is_encoder_decoder:
            raise RoutingError(
                f"{', '.join(map(repr, late))} act from a prompt's end on, but in an "
                f"encoder-decoder prompts have a stack of their own; leave them out."
            )
        self.base, self.tokenizer = base.reference, base.tokenizer
        self._turned = base.model.config.model_type in TURNED
        self.router, self.experts, self.records = router, experts, records
        self.layers: dict[str, RoutedLayer] = {}
        self.chooser: PromptChooser | None = None
        if isinstance(router, ByPrompt) and tables is not None:
            self.chooser = PromptChooser(router, tables, base.tokenizer)
        has_context = self.chooser is not None or late
        self.context = RoutingContext(self.chooser, self.tails) if has_context else None

    def add(self, original: Any, site: Site, stack: SiteStack, state: Mapping[str, Tensor]) -> None:
        """Add the layer that takes the place of `original` at `site`.

        `state` are the router's tensors there. Raises RoutingError for numbers that can't be
        computed with, and for experts that act late inside one of the base's own experts;
        ExpertError for tensors of other sizes than the router declares.
        """
        check_numbers(stack, site.name, self.experts)
        sizes = {"E": len(stack.experts), "n": site.in_features, "d": site.out_features}
        forms = {name: [sizes.get(x, x) for x in form] for name, form in self.router.sizes.items()}
        # Kernels trust them, whoever's router it is.
        check_parts(f"{site.name}, router {self.router.name}", forms, state)
        module = RouterAtSite(self.router, site.name, stack.experts, self.experts, state)
        module.context, module.sees_all = self.context, module.sees_all and not self._turned
        # Of a quantised layer the type is of integers, or of bytes.
        is_plain = original.weight.dtype in FLOATS
        module.to(original.weight.device, original.weight.dtype if is_plain else stack.dtype)
        tails = tuple(self.tails[z] for z in stack.experts.tolist())
        if any(tails) and not module.sees_all:
            raise RoutingError(
                f"Some experts act from a prompt's end on, but {site.name} takes tokens in another "
                f"order, or is inside one of the base's own experts, which see some tokens only; "
                f"leave them out."
            )
        self.layers[site.name] = RoutedLinear(original, site, stack, module, tails)

    def folded(self, original: nn.Module, site: Site, stack: SiteStack) -> bool:
        """Whether the mean of all experts is now inside the weight of `original`: it was cheaper.

        Not where a kernel is named, which computes with the experts' factors.
        """
        plain, size, router = stack.plain_lora, len(self.experts), self.router
        may_fold = router.folds and router.kernel == ANY_KERNEL and not any(self.tails)
        if not (plain and may_fold and is_cheaper_folded(original, plain)):
            return False
        check_numbers(stack, site.name, self.experts)
        folded = folded_weight(original, plain, size)
        self.layers[site.name] = FoldedLinear(original, site, folded, stack.experts, size)
        return True

    def install(self, model: PreTrainedModel) -> None:
        """Put the layers into `model`; `hidden` are attributes of its user's that ours hide."""
        self.hidden = {name: vars(model)[name] for name in INSTALLED if name in vars(model)}
        for name, layer in self.layers.items():
            replace_module(model, name, layer.train(layer.base.training))
        if self.context is not None:
            self.context.attach(model)
        setattr(model, ROUTED, self)
        model.tokenizer = self.tokenizer
        model.save_pretrained = partial(save_pretrained, model)

    def __repr__(self) -> str:
        what = f"{self.routing.router} on {self.base.id!r}"
        return f"<Composition by {what} (experts: {len(self.experts)})>"

    @property
    def routing(self) -> Routing:
        return self.router.routing


def composition_if_any(model: PreTrainedModel) -> Composition | None:
    """What `model` is made of if it is routed, else None."""
    parts: Composition | None = getattr(model, ROUTED, None)
    return parts


def composition_of(model: PreTrainedModel) -> Composition:
    """What `model` was composed of. Raises RoutingError when it is not routed."""
    parts = composition_if_any(model)
    if parts is None:
        raise RoutingError("This model is not routed; make one with compose(pool).")
    return parts


def compose(
    pool: Pool | str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    routing: Routing | None = None,
    scores: Scores | str | Path | None = None,
    weights: Mapping[str, float] | None = None,
    **settings: Unpack[RoutingSettings],
) -> PreTrainedModel:
    """The base model of `pool` with routed linears: still a PreTrainedModel, changed in place.

    Undo with `detach`. The model has its `tokenizer`, and `phatgoose` says what it is made of.

    Args:
        pool: Experts, as `Pool.open` takes them.
        base: A name, a loaded `Base` or a transformers model; None loads the one that the pool was
            trained on. A transformers model brings no tokenizer, so routers that read prompts need
            a name or a `Base`.
        routing: How experts are chosen; None is `Routing()`.
        scores: The single experts' scores, expert -> task -> score, or the comparison.json of a
            comparison: for routers oracle and best-individual.
        weights: The mixture of router weights, expert -> weight. Other routers have none.
        **settings: Fields of `routing` by name: `compose(pool, router="arrow:form=peft", k=3)`.
            Router "auto", the default, is the first that base and experts allow (docs/routers.md);
            the model records which.

    Raises:
        WrongBaseError: The base is not the experts' own.
        ExpertError: An expert doesn't fit the base.
        PoolError: An expert is unknown, or lacks vectors, embeddings or scores.
        ConfigError: A setting, router or kernel is unknown.
        RoutingError: The base is routed already.
    """
    if weights is not None:
        named = settings.get("router") or (routing.router if routing else AUTO)
        named = WEIGHTS if named == AUTO else named  # which refuses settings that aren't its own
        settings["router"] = ":".join(filter(None, (named, written_mixture(weights))))
    routing = _routing(routing, settings, "compose", *ARGUMENTS)
    pool = Pool.open(pool)
    loaded = resolve_base(base, pool.base)
    model, tokenizer = loaded.model, loaded.tokenizer
    pool = pool.measured(routing.reader)
    if routing.router == AUTO:
        routing = resolved(routing, pool, tokenizer)
    router = router_of(routing)
    check_routing(router, pool)
    scores = read_scores(scores) if isinstance(scores, str | Path) else scores
    pool = router.narrow(pool, scores)
    tables = router.tables(pool, scores) if isinstance(router, ByPrompt) else None
    sites = find_sites(model)
    for each in pool.experts:
        check_fit(each.name, each.modules, sites, each.gates, each.means)
    # Before any layer is replaced: it is the base alone that is read.
    router = router.fitted(pool, model, tokenizer)
    parts = Composition(loaded, router, pool.names, pool.records(), tables)
    _add_layers(parts, pool, model, sites)
    parts.install(model)
    return model


def _routing(
    routing: Routing | None, settings: Mapping[str, Any], where: str, *others: str
) -> Routing:
    return from_mapping(Routing, {**vars(routing or Routing()), **settings}, where, others)


def check_composable(pool: Pool, routing: Routing, scores: Scores | None = None) -> None:
    """Raise what composing `pool` by `routing` would, before other models have been read."""
    router = router_of(routing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # composing warns
        check_routing(router, pool)
        narrowed = router.narrow(pool, scores)
        if isinstance(router, ByPrompt) and "scores" in router.given:
            router.tables(narrowed, scores)


def _add_layers(
    parts: Composition, pool: Pool, model: PreTrainedModel, sites: Mapping[str, Site]
) -> None:
    """Add the routed layer of each site, whose experts are read ahead."""
    read = 0

    def stack_at(name: str) -> SiteStack:
        layer = model.get_submodule(name)
        return stack_of(pool, name, dtype_at(layer, model), layer.weight.device)

    # Sites ahead are read from the disk while this one is checked.
    stacks = prefetch(stack_at, pool.sites)
    states = prefetch(lambda name: parts.router.table(pool, name), pool.sites)
    for name, stack, state in zip(pool.sites, stacks, states, strict=True):
        layer = model.get_submodule(name)
        if not parts.folded(layer, sites[name], stack):
            parts.add(layer, sites[name], stack, state)
        read += sum(tensor.nbytes for tensor in stack.tensors().values())
        # Pages of the experts' files are given back on the way, so that memory goes to the stacks.
        if read > READ_AT_ONCE:
            pool.release()
            read = 0
    pool.release()


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """The base model again, exactly as it was before `compose`, which changed it in place.

    Args:
        model: A routed model.

    Raises:
        RoutingError: `model` is not routed.
    """
    parts = composition_of(model)
    if parts.context is not None:
        parts.context.detach()
    for name, layer in parts.layers.items():
        replace_module(model, name, layer.base)
    for name in INSTALLED:
        vars(model).pop(name, None)
    vars(model).update(parts.hidden)
    return model


# Prompts that passes are about.


@contextmanager
def routing_for(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    task: str | None = None,
    examples: Sequence[Example] | None = None,
) -> Iterator[Callable[[Sequence[int]], None]]:
    """Passes of `model` in this thread are about `prompts`, given by tokens, one row for each.

    Yields a function that takes the rows' indices in `prompts`, to call before each pass of others
    than all of them in order. Only routers that choose for whole prompts and experts that act from
    a prompt's end on go by this; in other models, routed or not, nothing changes. An evaluation
    names its `task`, by which router oracle chooses and random routers start again, and the
    `examples` of which the prompts were made: routers read their texts. Inside another one, that
    one's prompts count again afterwards. Raises what `PromptChooser.choose` does.
    """
    parts = composition_if_any(model)
    context = parts.context if parts else None
    for layer in parts.layers.values() if parts and task is not None else ():
        if isinstance(layer, RoutedLinear):
            layer.at_site.restart()
    if context is None:
        yield lambda _: None
        return
    asked = None
    if parts and parts.chooser and examples:
        asked = [asked_in(example.input) for example in examples]
    found = context.routing_of(prompts, asked=asked, examples=examples, task=task)

    def use(rows: Sequence[int]) -> None:
        some = found.of(rows)
        context.use(some.choice, some.lengths)

    with context.using(found):
        yield use


def asked_in(text: str) -> str | ChatTexts:
    """What routers by prompt read of an example's input."""
    return ChatTexts.of(text.turns) if isinstance(text, Chat) else text


# Saving, and loading beside a base that is loaded by its name.


def save(model: PreTrainedModel, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write the routed `model` to `directory`: experts, router and hashes; the base by name only.

    Complete or not at all. Config and tokenizer are written too, for transformers.

    Args:
        model: A routed model.
        directory: The folder to make.
        overwrite: Replace the folder if it is there.

    Raises:
        RoutingError: `model` is not routed, its base's weights have changed, or `directory` exists
            or can't be written.
    """
    with new_directory(Path(directory), RoutingError, overwrite=overwrite) as work:
        _write_model(model, work)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    **how: Any,
) -> None:
    """What `model.save_pretrained` is while `model` is routed: writes the files that `save` does.

    As transformers' own it writes into a folder that may be there already, replaces what it wrote
    there before, and leaves the rest alone. `phatgoose.load` reads the folder. `state_dict` and
    `how` (shards, say) are about the base's weights, of which none are written. Raises as `save`
    does, and RoutingError for a folder that holds another model's config.json.
    """
    if push_to_hub:
        raise RoutingError("A routed model goes to the Hub by model.push_to_hub(name).")
    target = Path(save_directory)
    config = target / CONFIG
    if config.exists() and read_json(config, dict, RoutingError).get("model_type") != MODEL_TYPE:
        raise RoutingError(f"{target} holds another model ({CONFIG}); choose another place.")
    if is_main_process:
        with writing(target, RoutingError):
            _write_model(model, target)


def _write_model(model: PreTrainedModel, folder: Path) -> None:
    parts = composition_of(model)
    if surely_differs(model, parts.base):
        raise RoutingError(
            f"The weights of the base {parts.base.id!r} have changed since it was loaded: trained "
            f"or resized? A routed model is saved without them; detach it and save the base."
        )
    folder.mkdir(parents=True, exist_ok=True)
    routing = parts.routing
    info = {
        "format_version": FORMAT_VERSION,
        "base": asdict(parts.base),
        "routing": {"router": routing.router, "k": routing.k, "kernel": routing.kernel},
        "experts": shareable(parts.records),
        "weights_sha256": "",
        "lookup": dict(parts.chooser.tables.info) if parts.chooser else {},
    }
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [type(model).__name__],
        "is_encoder_decoder": bool(model.config.is_encoder_decoder),
        "base_model": parts.base.id,
    }
    sites = {}
    for name, layer in parts.layers.items():
        if isinstance(layer, FoldedLinear):
            sites[name] = SitePart(SiteStack(layer.experts), {"folded": layer.folded})
        elif isinstance(layer, RoutedLinear):
            # A model that was moved to another type has its scalings in that, too.
            stack = layer.stack.to(layer.experts.device, layer.stack.dtype)
            sites[name] = SitePart(stack, layer.at_site.state())
    tables = parts.chooser.tables if parts.chooser else Tables(parts.experts)
    write_saved(folder, info, sites, tables)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n", RoutingError)
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(folder)


def load(
    directory: str | Path,
    base: Base | PreTrainedModel | str | None = None,
    *,
    dtype: str = "auto",
    embedder: str | None = None,
    reader: str | None = None,
) -> PreTrainedModel:
    """The routed model that `save` wrote to `directory`; the experts' own files are not needed.

    Args:
        directory: The folder.
        base: A name, a loaded `Base` or a transformers model; None loads the base by its recorded
            name.
        dtype: "auto", "float32", "bfloat16" or "float16", for a base that is loaded here.
        embedder: The embedder of a router that uses one, if it isn't the default one.
        reader: The reader of a router that uses one, if it isn't a known one.

    Raises:
        RoutingError, ExpertError: The folder is missing or damaged.
        WrongBaseError: The base is another one.
        ConfigError: The router needs an embedder or a reader that wasn't named.
    """
    folder = Path(directory)
    saved = read_saved(folder)
    loaded = resolve_base(base, saved.base, dtype)
    model, sites = loaded.model, find_sites(loaded.model)
    router = router_of(replace(saved.router.routing, embedder=embedder, reader=reader))
    tables = saved.tables if isinstance(router, ByPrompt) else None
    parts = Composition(loaded, router, saved.names, saved.records, tables)
    for name, sizes in saved.sizes.items():
        site = sites.get(name)
        wanted = (site.in_features, site.out_features) if site else (0, 0)
        if not site or any(sizes.get(x, n) != n for x, n in zip("nd", wanted, strict=True)):
            raise WrongBaseError(
                f"{folder}: experts act on {name} with sizes {dict(sizes)}, which the base lacks."
            )
        original: Any = model.get_submodule(name)
        device, kind = original.weight.device, dtype_at(original, model)
        stack, state = saved.at(name)
        if "folded" in state:
            folded, experts = state["folded"].to(device, kind), stack.experts.to(device)
            parts.layers[name] = FoldedLinear(original, site, folded, experts, len(saved.names))
        else:
            parts.add(original, site, stack.to(device, kind), state)
    parts.install(model)
    return model


# Opening a model from any place.


def is_routed(place: str | Path) -> bool:
    """True for a folder that `save` of a routed model wrote."""
    return os.path.isfile(os.path.join(place, ROUTED_INFO))


def is_pool(place: str | Path) -> bool:
    """True for an expert's directory, a folder of such, or a reference to the Hub."""
    if HubReference.is_one(place):
        return True
    is_model = os.path.isfile(os.path.join(place, CONFIG)) or is_routed(place)
    return os.path.isdir(place) and not is_model


def require_pool(place: str | Path) -> None:
    """Raise ConfigError unless `place` is a pool."""
    if not is_pool(place):
        there = Path(place).exists()
        gone = "" if there else f" No folder {place} is here.{closest_beside(place)}"
        raise ConfigError(
            f"{place} is not a pool: a routed model has its own router and experts, and a base "
            f"alone has none. Name the pool to choose them.{gone}"
        )


def open_model(
    place: Pool | str | Path,
    base: Base | str | None = None,
    *,
    dtype: str = "auto",
    routing: Routing | None = None,
    scores: Scores | str | Path | None = None,
) -> Base:
    """The model at `place`: a routed one, a pool composed by `routing`, or a base model alone.

    `base`, a loaded one or a name, serves pools and routed models; None loads the one they name.
    `scores` are those of `compose`, for pools alone; of `routing` a routed model takes the
    embedder. Raises ConfigError when another place is given scores, and what loading or composing
    does.
    """
    if scores and not isinstance(place, Pool):
        require_pool(place)
    if not isinstance(place, Pool) and is_routed(place):
        named = routing or Routing()
        model = load(place, base, dtype=dtype, embedder=named.embedder, reader=named.reader)
    elif isinstance(place, Pool) or is_pool(place):
        pool = Pool.open(place)
        loaded = resolve_base(base, pool.base, dtype)
        model = compose(pool, loaded, routing=routing, scores=scores)
    else:
        return load_base(place, dtype=dtype)
    parts = composition_of(model)
    return Base(model, parts.tokenizer, **asdict(parts.base))


def open_chooser(
    place: Pool | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    routing: Routing | None = None,
    **settings: Unpack[RoutingSettings],
) -> PromptChooser:
    """What chooses the experts of a pool for a prompt; no base is loaded.

        chooser = open_chooser("experts/")
        chooser.choose(["What is 12 + 7?"]).named(chooser.experts)

    `routing` and `settings` are those of `compose`. Prompts are as a `PromptChooser` takes them;
    those that are tokens need the `tokenizer` that made them. Raises ConfigError for a router that
    looks at no prompt, and what opening a pool raises.
    """
    routing = _routing(routing, settings, "open_chooser")
    pool = Pool.open(place).measured(routing.reader)
    router = router_of(first_allowed(routing, pool, BY_PROMPT))
    if not isinstance(router, ByPrompt):
        raise ConfigError(
            f"Router {router.name} doesn't choose by a prompt alone; use retrieval, centroid or "
            f"discriminant."
        )
    check_served(router)
    check_routing(router, pool)
    return PromptChooser(router, router.tables(pool), tokenizer)
