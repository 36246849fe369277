"""vLLM's linear layers with experts: replaced as the model is built, checked when it is loaded.

vLLM makes each linear layer of the class that is registered for its name (`register_oot`). Ours is
the same class, which takes up its experts' factors in its constructor, before vLLM measures what
memory is left, and computes through a *linear method* (vLLM's word for what multiplies by a weight,
quantised or not) that calls the operator of `op` after vLLM's own. There the input is what every
process holds of it and the output is not reduced over processes yet, so a layer whose inputs are
split needs one more sum, of the routing scores.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedModel
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.model_loader.utils import get_model_architecture

from phatgoose.base.identity import BaseReference, check_base, fingerprint_of_files, tensor_named
from phatgoose.base.loading import load_skeleton
from phatgoose.errors import BaseModelError, ConfigError, ExpertError, RoutingError
from phatgoose.files import TensorFile

from . import op
from .served import (
    ELSEWHERE,
    GATEWAY,
    MODEL,
    Part,
    Section,
    Share,
    check_place,
    open_served,
    parts_of,
    place_of,
)

logger = init_logger("vllm.phatgoose")  # vLLM shows loggers below its own

REPLACED = (
    linear.QKVParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.ColumnParallelLinear,
    linear.RowParallelLinear,
    linear.ReplicatedLinear,
)
UNASKED = ("ngram", "ngram_gpu", "suffix")  # vLLM's ways of guessing ahead without another model


def replace_layers() -> None:
    """Register our layers in place of vLLM's. Raises ConfigError for an impossible place."""
    check_place(os.environ.get(MODEL))
    for kind in REPLACED:
        if kind.__name__ not in op_registry_oot:
            kind.register_oot(name=kind.__name__)(_routed(kind))


def _routed(kind: type[LinearBase]) -> type[LinearBase]:
    def construct(self: LinearBase, *arguments: object, **options: object) -> None:
        kind.__init__(self, *arguments, **options)
        _loading_of(get_current_vllm_config()).equip(self)

    # vLLM looks some layers up by the name of their class.
    return type(kind.__name__, (kind,), {"__init__": construct, "__module__": __name__})


class RoutedMethod:
    """Before a linear method's class: what it computes, and the experts' updates."""

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = super().apply(layer, x, bias)  # type: ignore[misc]
        if layer.phatgoose_names:
            tensors = [getattr(layer, name) for name in layer.phatgoose_names]
            op.add_routed(y, x, tensors, layer.phatgoose_update)
        return y

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        layer.phatgoose_loading.finish(layer)
        super().process_weights_after_loading(layer)  # type: ignore[misc]


@cache
def _method_class(kind: type[LinearMethodBase]) -> type[LinearMethodBase]:
    return type(kind.__name__, (RoutedMethod, kind), {"__module__": __name__})


def routed_method(method: LinearMethodBase) -> LinearMethodBase:
    """`method` with the experts after it; still of its class, by which vLLM chooses kernels."""
    kind: Any = type(method)
    routed = object.__new__(_method_class(kind))
    vars(routed).update(vars(method))
    return routed


# One model while vLLM loads it.


class Loading:
    """A model that vLLM builds and loads in this process, and the experts on their way into it."""

    def __init__(self, config: VllmConfig) -> None:
        _check_config(config)
        self.config = config
        self.served = open_served()
        self.model_class, _ = get_model_architecture(config.model_config)
        packed = getattr(self.model_class, "packed_modules_mapping", None) or {}
        mapper = getattr(self.model_class, "hf_to_vllm_mapper", None)
        rename = mapper.map_name if mapper is not None else str
        self.sites: dict[str, dict[int, str]] = {}  # by layer, of those that it packs
        self.counts: dict[str, int] = {}
        for site in self.served.sites:
            place = place_of(site, packed, rename)
            self.sites.setdefault(place.layer, {})[place.member] = site
            self.counts[place.layer] = place.members
        self.equipped: set[str] = set()
        self.is_checked = False
        # Part of the key under which vLLM keeps compiled graphs: which layers call the operator,
        # and with how many tensors.
        graph = f"{self.served.router.name}: {sorted(self.sites.items())}"
        if isinstance(config.additional_config, dict):
            config.additional_config["phatgoose"] = sha256(graph.encode()).hexdigest()

    def equip(self, layer: LinearBase) -> None:
        """Give `layer` its experts' factors, if it has experts. Raises RoutingError."""
        sites = self.sites.get(layer.prefix)
        if sites is None:
            return
        self.equipped.add(layer.prefix)
        share = share_of(layer)
        folds = self.served.router.folds
        count = self.counts[layer.prefix]
        parts = parts_of(layer.prefix, share, sites, count)
        why = ""
        if folds:
            why = f"router {self.served.router.name} adds experts to weights"
        elif len(share.sections) > 1 and count == 1:
            why = "the base has it packed, in an order that can't be seen then"
        if why and not _is_plain(layer):
            raise RoutingError(f"{layer.prefix} is quantised, and {why}: {GATEWAY}.")
        layer.phatgoose_loading = self
        layer.phatgoose_parts = parts
        layer.phatgoose_names = ()
        layer.phatgoose_update = -1
        layer.requires_unquantized_input = True  # vLLM may quantise in the layer before otherwise
        layer.quant_method = routed_method(layer.quant_method)
        if not folds:
            self._hold(layer, share, parts)

    def _hold(self, layer: LinearBase, share: Share, parts: tuple[Part, ...]) -> None:
        served = self.served
        updates = []
        names = []
        sizes = []
        for index, part in enumerate(parts):
            experts = served.experts(part, share, layer.params_dtype)
            sizes.append((part.first, part.width, len(experts.A)))
            state = tuple(experts.state)
            router = served.router
            updates.append(op.SiteUpdate(router, experts.numbers, state, part.first, part.width))
            for name, tensor in {**experts.state, "A": experts.A, "B": experts.B}.items():
                names.append(f"phatgoose_{index}_{name}")
                # No parameters: vLLM would look for them in the base's files.
                here = tensor.to(torch.get_default_device())
                layer.register_buffer(names[-1], here, persistent=False)
        layer.phatgoose_names = tuple(names)
        # The sizes go with the pool and the part; what else an update is, with the router.
        key = (served.place, served.router.routing, served.names, share, tuple(sizes))
        split = op.Split(share.inputs, _sum) if share.splits_inputs else None
        layer.phatgoose_update = op.place_of_update(key, op.LayerUpdate(tuple(updates), split))

    def finish(self, layer: LinearBase) -> None:
        """Once the weights are there, before vLLM rearranges them: check them; fold, if so."""
        if not self.is_checked:
            self._check_model()
            self.is_checked = True
        if not _is_plain(layer):
            return
        share = share_of(layer)
        for part in layer.phatgoose_parts:
            weight = layer.weight.data[part.first : part.first + part.width]
            self._check_rows(part, share, weight)
            if self.served.router.folds:
                weight.copy_(self.served.folded(part, share, weight))

    def _check_model(self) -> None:
        missing = sorted(self.sites.keys() - self.equipped)
        if missing:
            shown = ", ".join(missing[:3])
            if len(missing) > 3:
                shown += ", …"
            raise RoutingError(
                f"Experts act on {shown}, and vLLM's {self.model_class.__name__} has no linear "
                f"layer there that can be routed ({len(missing)} of {len(self.sites)} layers): "
                f"{GATEWAY}."
            )
        verified = self.files.check(self.served.base)
        router = self.served.router
        logger.info(
            "phatgoose: %d experts of %s at %d layers by router %s%s; base %s",
            len(self.served.names),
            self.served.place,
            len(self.sites),
            router.name,
            f" (k = {router.k})" if router.k else "",
            "verified by its files' fingerprint" if verified else "taken on trust",
        )

    @cached_property
    def files(self) -> BaseFiles:
        return BaseFiles(self.config)

    def _check_rows(self, part: Part, share: Share, weight: Tensor) -> None:
        """Raise RoutingError unless `weight` [d', n'] has the rows of the base's file for it."""
        stored = self.files.weight(part.site)
        if stored is None:
            return
        outputs = torch.cat([torch.arange(rows.start, rows.stop) for rows in part.rows])
        sample = torch.arange(0, part.width, max(1, part.width // 8))
        loaded = weight[sample.to(weight.device)].cpu()
        for choice in (stored, stored.T):  # GPT-2's are [n, d]
            if outputs[-1] < len(choice) and choice.shape[1] == share.inputs:
                expected = choice[outputs[sample]][:, share.columns].to(loaded.dtype)
                if torch.equal(expected, loaded):
                    return
        raise RoutingError(
            f"vLLM's weight at {part.site} isn't what the files of {self.files.name} have there: "
            f"another base, or outputs in another order (GPT-NeoX, Falcon and BLOOM weave heads). "
            f"{ELSEWHERE}"
        )


def share_of(layer: LinearBase) -> Share:
    """What this process holds of a linear layer of vLLM's."""
    if isinstance(layer, linear.QKVParallelLinear):
        keys = layer.total_num_kv_heads
        # vLLM's own output_sizes count keys once for each process that has a copy.
        totals = [layer.total_num_heads * layer.head_size]
        totals += [keys * layer.head_size, keys * layer.v_head_size]
    else:
        totals = list(getattr(layer, "output_sizes", [layer.output_size]))
    sections = tuple(map(Section, totals, layer.output_partition_sizes))
    inputs = getattr(layer, "input_size_per_partition", layer.input_size)
    return Share(layer.input_size, inputs, sections, layer.tp_rank, layer.tp_size)


def _is_plain(layer: LinearBase) -> bool:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype != layer.params_dtype or weight.is_meta:
        return False
    outputs = sum(layer.output_partition_sizes)
    return weight.shape == (outputs, share_of(layer).held_inputs)


def _sum(scores: Tensor) -> Tensor:
    # float32, which each of vLLM's ways of summing knows.
    total: Tensor = tensor_model_parallel_all_reduce(scores.float())
    return total.double()


def _check_config(config: VllmConfig) -> None:
    guesses = config.speculative_config
    refused = {
        "--enable-lora adds one adapter to whole requests, beside the experts": config.lora_config,
        "--pipeline-parallel-size above 1 isn't known to the plugin, --tensor-parallel-size is": (
            config.parallel_config.pipeline_parallel_size > 1
        ),
        "a second model that guesses ahead would be routed as the first": (
            guesses is not None and guesses.method not in UNASKED
        ),
    }
    for why, is_set in refused.items():
        if is_set:
            raise ConfigError(f"{MODEL} is set, and {why}: leave one of them out.")


_latest: list[Loading] = []


def _loading_of(config: VllmConfig) -> Loading:
    if not _latest or _latest[0].config is not config:
        _latest[:] = [Loading(config)]
    return _latest[0]


class BaseFiles:
    """The safetensors files that vLLM loads its base from; numbers are read as they are asked for.

    Whole and unpacked, whatever vLLM makes of them: sharded, packed and quantised as it loads.
    """

    def __init__(self, config: VllmConfig) -> None:
        self.name = config.model_config.model
        self.revision = config.model_config.revision
        self.is_made_up = config.load_config.load_format == "dummy"
        self.cache = config.load_config.download_dir

    def check(self, base: BaseReference) -> bool:
        """True if these are of this `base`; False, with a warning, where it can't be seen.

        Raises WrongBaseError where they are another's.
        """
        why = ""
        fingerprint = None
        if base.fingerprint is None:
            why = "the experts have no fingerprint"
        elif self.is_made_up:
            why = "its weights are made up"
        elif self.skeleton is None:
            why = "its config.json can't be used"
        else:
            fingerprint = fingerprint_of_files(self.skeleton, self.tensors)
        if fingerprint is not None:
            check_base(base, BaseReference(self.name, self.revision, fingerprint))
            return True
        logger.warning(
            "phatgoose: %s can't be compared with the experts' base, %s, which is taken on trust: "
            "%s.",
            self.name,
            base.id,
            why or "its files are quantised, or laid out otherwise than transformers has it",
        )
        return False

    def weight(self, site: str) -> Tensor | None:
        """The whole weight of a layer of the base, None where the files have none of this name."""
        if self.is_made_up or self.skeleton is None:
            return None
        weight = tensor_named(self.skeleton, f"{site}.weight", self.tensors)
        return weight if weight is not None and weight.is_floating_point() else None

    @cached_property
    def skeleton(self) -> PreTrainedModel | None:
        try:
            return load_skeleton(self.name, revision=self.revision)
        except BaseModelError as error:
            logger.warning("phatgoose: %s", error)
            return None

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        folder = Path(self.name)
        if not folder.is_dir():
            stored = snapshot_download(
                self.name, revision=self.revision, cache_dir=self.cache, local_files_only=True
            )
            folder = Path(stored)
        try:
            files = [TensorFile(path) for path in sorted(folder.glob("*.safetensors"))]
        except ExpertError as error:  # of a type that is none of ours, say
            logger.warning("phatgoose: %s", error)
            return {}
        return {name: tensor for file in files for name, tensor in file.items()}
