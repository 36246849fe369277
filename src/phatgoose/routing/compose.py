"""Composing: a base model and a pool become one transformers model that routes every token.

What a routed model is made of, and how it is saved and loaded (`saved` has the folder's format).
"""

from __future__ import annotations

import json
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
from ..errors import RoutingError, WrongBaseError
from ..experts.adapter_files import check_parts
from ..experts.expert import tail_of
from ..experts.module import check_fit
from ..experts.pool import Pool
from ..files import JsonObject, new_directory, prefetch, read_json, write_text, writing
from ..names import CONFIG
from ..sites import FLOATS, ROUTED, Site, dtype_at, find_sites, replace_module
from ..tasks.task import Chat, Example
from .context import RoutingContext
from .conversation import ChatTexts
from .kernels import AUTO as ANY_KERNEL
from .layers import (
    FoldedLinear,
    RoutedLayer,
    RoutedLinear,
    TailedLinear,
    folded_weight,
    has_plain_weight,
    matrix_of,
)
from .routers.auto import resolved
from .routers.fixed import read_scores
from .routers.prompt import ByPrompt, PromptChooser, Tables
from .routers.registry import AUTO, WEIGHTS, written_mixture
from .routers.router import Router, RouterAtSite, Scores, check_routing, router_of
from .saved import FORMAT_VERSION, read_saved, shareable, write_saved
from .stacks import SitePart, SiteStack, check_numbers, stack_of

INSTALLED = (ROUTED, "tokenizer", "save_pretrained", "generate", "init_continuous_batching")
ARGUMENTS = ("scores", "weights")  # of `compose`, beside routing settings
TURNED = ("fsmt", "led", "xlnet")  # whose layers take [tokens, rows]
READ_AT_ONCE = 2**26  # bytes of experts' files in memory, beside the stacks made of them


def resolve_base(
    base: Base | PreTrainedModel | str | Path | None, recorded: BaseReference, dtype: str = "auto"
) -> Base:
    """The base to route in: a name, loaded in `dtype`, a `Base`, a model, or None for `recorded`.

    A transformers model brings no tokenizer. Raises WrongBaseError where it isn't `recorded`,
    BaseModelError when it reads padding.
    """
    if isinstance(base, PreTrainedModel):
        check_heeds_masks(base.config)
        no_tokenizer = cast(PreTrainedTokenizerBase, None)
        base = Base(base, no_tokenizer, recorded.id, recorded.revision, fingerprint(base))
    elif not isinstance(base, Base):
        revision = None if base else recorded.revision
        base = load_base(base or recorded.id, revision=revision, dtype=dtype)
    kinds = quantisation(base.model)
    if kinds and recorded.fingerprint and base.fingerprint != recorded.fingerprint:
        warnings.warn(
            f"The base model {base.id!r} is quantised ({kinds}), so its weights can't be "
            f"compared with the experts' fingerprint; taking it on trust.",
            stacklevel=3,
        )
        base = replace(base, fingerprint=recorded.fingerprint)
    check_base(recorded, base.reference)
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
        records: list[JsonObject],
        tables: Tables | None,
    ) -> None:
        """`tables` are those of a router by prompt.

        Raises RoutingError for experts that act from a prompt's end on in an encoder-decoder.
        """
        self.experts = experts
        self.records = records
        self.tails = tuple(map(tail_of, records))
        if self.tailed and base.is_encoder_decoder:
            raise RoutingError(
                f"{', '.join(map(repr, self.tailed))} act from a prompt's end on, but in an "
                f"encoder-decoder prompts have a stack of their own; leave them out."
            )
        self.base = base.reference
        self.tokenizer = base.tokenizer
        self._turned = base.model.config.model_type in TURNED
        self.router = router
        self.layers: dict[str, RoutedLayer] = {}
        self.chooser: PromptChooser | None = None
        if isinstance(router, ByPrompt) and tables is not None:
            self.chooser = PromptChooser(router, tables, base.tokenizer)
        self.context: RoutingContext | None = None
        if self.chooser is not None or self.tailed:
            self.context = RoutingContext(self.chooser, self.tails)

    @property
    def tailed(self) -> list[str]:
        """The names of the experts that act from a prompt's end on."""
        return [name for name, tail in zip(self.experts, self.tails, strict=True) if tail]

    def add(
        self, original: nn.Module, site: Site, stack: SiteStack, state: Mapping[str, Tensor]
    ) -> None:
        """Add the layer that takes the place of `original` at `site`.

        `state` are the router's tensors there. Raises RoutingError for numbers that can't be
        computed with, and for experts with tails inside one of the base's own experts;
        ExpertError for tensors of other sizes than the router declares.
        """
        check_numbers(stack, site.name, self.experts)
        sizes = {"E": len(stack.experts), "n": site.in_features, "d": site.out_features}
        forms = {}
        for name, letters in self.router.sizes.items():
            forms[name] = [sizes.get(letter, letter) for letter in letters]
        # Kernels trust them, whoever's router it is.
        check_parts(f"{site.name}, router {self.router.name}", forms, state)
        at_site = RouterAtSite(self.router, site.name, stack.experts, self.experts, state)
        at_site.context = self.context
        at_site.sees_all = at_site.sees_all and not self._turned
        weight: Tensor = original.weight  # type: ignore[assignment]
        # Of a quantised layer the type is of integers, or of bytes.
        at_site.to(weight.device, weight.dtype if weight.dtype in FLOATS else stack.dtype)
        tails = tuple(self.tails[z] for z in stack.experts.tolist())
        if not any(tails):
            self.layers[site.name] = RoutedLinear(original, site, stack, at_site)
            return
        if not at_site.sees_all:
            raise RoutingError(
                f"Some experts act from a prompt's end on, but {site.name} takes tokens in another "
                f"order, or is inside one of the base's own experts, which see some tokens only; "
                f"leave them out."
            )
        self.layers[site.name] = TailedLinear(original, site, stack, at_site, tails)

    def folded(self, original: nn.Module, site: Site, stack: SiteStack) -> bool:
        """Whether the mean of all experts is now inside the weight of `original`: it was cheaper.

        Not where a kernel is named, which computes with the experts' factors.
        """
        plain = stack.plain_lora
        size = len(self.experts)
        may_fold = self.router.folds and self.router.kernel == ANY_KERNEL and not self.tailed
        if not (plain and may_fold and has_plain_weight(original)):
            return False
        if plain.A.numel() + plain.B.numel() <= matrix_of(original).numel():
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
        name = settings.get("router") or (routing or Routing()).router
        if name == AUTO:
            name = WEIGHTS  # which refuses settings that aren't its own
        settings["router"] = ":".join(filter(None, (name, written_mixture(weights))))
    values = {**vars(routing or Routing()), **settings}
    routing = from_mapping(Routing, values, "compose", ARGUMENTS)
    pool = Pool.open(pool)
    loaded = resolve_base(base, pool.base)
    model = loaded.model
    tokenizer = loaded.tokenizer
    pool = pool.measured(routing.reader)
    if routing.router == AUTO:
        routing = resolved(routing, pool, tokenizer)
    router = router_of(routing)
    check_routing(router, pool)
    if isinstance(scores, str | Path):
        scores = read_scores(scores)
    pool = router.narrow(pool, scores)
    tables = router.tables(pool, scores) if isinstance(router, ByPrompt) else None
    sites = find_sites(model)
    for expert in pool.experts:
        check_fit(expert.name, expert.modules, sites, expert.gates, expert.means)
    # Before any layer is replaced: it is the base alone that is read.
    router = router.fitted(pool, model, tokenizer)
    parts = Composition(loaded, router, pool.names, pool.records(), tables)
    _add_layers(parts, pool, model, sites)
    parts.install(model)
    return model


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
    if parts is not None and task is not None:
        for layer in parts.layers.values():
            if isinstance(layer, RoutedLinear):
                layer.at_site.restart()
    if parts is None or parts.context is None:
        yield lambda _: None
        return
    context = parts.context
    texts = None
    if parts.chooser and examples:
        inputs = [example.input for example in examples]
        texts = [ChatTexts.of(text.turns) if isinstance(text, Chat) else text for text in inputs]
    routing = context.routing_of(prompts, texts=texts, examples=examples, task=task)

    def use(rows: Sequence[int]) -> None:
        part = routing.of(rows)
        context.use(part.choice, part.lengths)

    with context.using(routing):
        yield use


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
    state_dict: object = None,
    push_to_hub: bool = False,
    **how: object,
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
    tables = parts.chooser.tables if parts.chooser else Tables(parts.experts)
    info = {
        "format_version": FORMAT_VERSION,
        "base": asdict(parts.base),
        "routing": {"router": routing.router, "k": routing.k, "kernel": routing.kernel},
        "experts": shareable(parts.records),
        "weights_sha256": "",
        "lookup": dict(tables.info),
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
    model = loaded.model
    sites = find_sites(model)
    router = router_of(replace(saved.router.routing, embedder=embedder, reader=reader))
    parts = Composition(loaded, router, saved.names, saved.records, saved.tables)
    for name, sizes in saved.sizes.items():
        site = sites.get(name)
        if site is None or not _has_sizes(site, sizes):
            raise WrongBaseError(
                f"{folder}: experts act on {name} with sizes {dict(sizes)}, which the base lacks."
            )
        original: Any = model.get_submodule(name)
        device = original.weight.device
        dtype_there = dtype_at(original, model)
        stack, state = saved.at(name)
        if "folded" in state:
            folded = state["folded"].to(device, dtype_there)
            experts = stack.experts.to(device)
            parts.layers[name] = FoldedLinear(original, site, folded, experts, len(saved.names))
        else:
            parts.add(original, site, stack.to(device, dtype_there), state)
    parts.install(model)
    return model


def _has_sizes(site: Site, sizes: Mapping[str | int, int]) -> bool:
    n = site.in_features
    d = site.out_features
    return sizes.get("n", n) == n and sizes.get("d", d) == d
