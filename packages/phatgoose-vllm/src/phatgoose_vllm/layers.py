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
    for each in REPLACED:
        if each.__name__ not in op_registry_oot:
            each.register_oot(name=each.__name__)(_routed(each))


def _routed(kind: type[Any]) -> type[Any]:
    def construct(self: Any, *given: Any, **named: Any) -> None:
        kind.__init__(self, *given, **named)
        _loading_of(get_current_vllm_config()).equip(self)

    # vLLM looks some layers up by the name of their class.
    return type(kind.__name__, (kind,), {"__init__": construct, "__module__": __name__})


class RoutedMethod:
    """Before a linear method's class: what it computes, and the experts' updates."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = super().apply(layer, x, bias)  # type: ignore[misc]
        if layer.phatgoose_names:
            tensors = [getattr(layer, name) for name in layer.phatgoose_names]
            op.add_routed(y, x, tensors, layer.phatgoose_update)
        return y

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.phatgoose_loading.finish(layer)
        super().process_weights_after_loading(layer)  # type: ignore[misc]


@cache
def _method_class(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (RoutedMethod, kind), {"__module__": __name__})


def routed_method(method: Any) -> Any:
    """`method` with the experts after it; still of its class, by which vLLM chooses kernels."""
    kind: Any = type(method)
    found = object.__new__(_method_class(kind))
    found.__dict__ = dict(vars(method))
    return found


# One model while vLLM loads it.


class Loading:
    """A model that vLLM builds and loads in this process, and the experts on their way into it."""

    def __init__(self, config: VllmConfig) -> None:
        _check_config(config)
        self.config, self.served = config, open_served()
        self.model_class, _ = get_model_architecture(config.model_config)
        packed = getattr(self.model_class, "packed_modules_mapping", None) or {}
        mapper = getattr(self.model_class, "hf_to_vllm_mapper", None)
        rename = mapper.map_name if mapper is not None else (lambda name: name)
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

    def equip(self, layer: Any) -> None:
        """Give `layer` its experts' factors, if it has experts. Raises RoutingError."""
        sites = self.sites.get(layer.prefix)
        if sites is None:
            return
        self.equipped.add(layer.prefix)
        share, is_plain, folds = share_of(layer), _is_plain(layer), self.served.router.folds
        parts = parts_of(layer.prefix, share, sites, self.counts[layer.prefix])
        is_packed = len(share.sections) > 1 and self.counts[layer.prefix] == 1
        if not is_plain and (folds or is_packed):
            why = (
                f"router {self.served.router.name} adds experts to weights"
                if folds
                else "the base has it packed, in an order that can't be seen then"
            )
            raise RoutingError(f"{layer.prefix} is quantised, and {why}: {GATEWAY}.")
        layer.phatgoose_loading, layer.phatgoose_parts = self, parts
        layer.phatgoose_names, layer.phatgoose_update = (), -1
        layer.requires_unquantized_input = True  # vLLM may quantise in the layer before otherwise
        layer.quant_method = routed_method(layer.quant_method)
        if not folds:
            self._hold(layer, share, parts)

    def _hold(self, layer: Any, share: Share, parts: tuple[Part, ...]) -> None:
        served = self.served
        experts = [served.experts(part, share, layer.params_dtype) for part in parts]
        # The sizes go with the pool and the part; what else an update is, with the router.
        sizes = tuple(
            (part.first, part.width, len(each.A)) for part, each in zip(parts, experts, strict=True)
        )
        key = (served.place, served.router.routing, served.names, share, sizes)

        updates = tuple(
            op.SiteUpdate(served.router, each.numbers, tuple(each.state), part.first, part.width)
            for part, each in zip(parts, experts, strict=True)
        )
        split = op.Split(share.inputs, _sum) if share.splits_inputs else None
        layer.phatgoose_update = op.place_of_update(key, op.LayerUpdate(updates, split))
        device, names = torch.get_default_device(), []
        for index, each in enumerate(experts):
            for name, tensor in {**each.state, "A": each.A, "B": each.B}.items():
                names.append(f"phatgoose_{index}_{name}")
                # No parameters: vLLM would look for them in the base's files.
                layer.register_buffer(names[-1], tensor.to(device), persistent=False)
        layer.phatgoose_names = tuple(names)

    def finish(self, layer: Any) -> None:
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
            shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
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
        some = torch.arange(0, part.width, max(1, part.width // 8))
        wanted = stored if stored.shape[1] == share.inputs else stored.T  # GPT-2's are [n, d]
        choices = [wanted, stored.T] if stored.shape[0] == stored.shape[1] else [wanted]
        found = weight[some.to(weight.device)].cpu()
        for choice in choices:
            if outputs[-1] < len(choice) and choice.shape[1] == share.inputs:
                expected = choice[outputs[some]][:, share.columns].to(found.dtype)
                if torch.equal(expected, found):
                    return
        raise RoutingError(
            f"vLLM's weight at {part.site} isn't what the files of {self.files.name} have there: "
            f"another base, or outputs in another order (GPT-NeoX, Falcon and BLOOM weave heads). "
            f"{ELSEWHERE}"
        )


def share_of(layer: Any) -> Share:
    """What this process holds of a linear layer of vLLM's."""
    held = list(layer.output_partition_sizes)
    if isinstance(layer, linear.QKVParallelLinear):
        keys = layer.total_num_kv_heads
        # vLLM's own output_sizes count keys once for each process that has a copy.
        totals = [layer.total_num_heads * layer.head_size]
        totals += [keys * layer.head_size, keys * layer.v_head_size]
    else:
        totals = list(getattr(layer, "output_sizes", [layer.output_size]))
    sections = tuple(Section(*sizes) for sizes in zip(totals, held, strict=True))
    inputs = getattr(layer, "input_size_per_partition", layer.input_size)
    return Share(layer.input_size, inputs, sections, layer.tp_rank, layer.tp_size)


def _is_plain(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype != layer.params_dtype or weight.is_meta:
        return False
    share = share_of(layer)
    held = sum(section.held for section in share.sections)
    return weight.shape == (held, share.held_inputs)


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
    for why, is_asked in refused.items():
        if is_asked:
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
        self.name, self.revision = config.model_config.model, config.model_config.revision
        self.is_made_up = config.load_config.load_format == "dummy"
        self.cache = config.load_config.download_dir

    def check(self, wanted: BaseReference) -> bool:
        """True if these are of the base `wanted`; False, with a warning, where it can't be seen.

        Raises WrongBaseError where they are another's.
        """
        why = "its weights are made up" if self.is_made_up else "its config.json can't be used"
        found = None
        if not self.is_made_up and self.skeleton is not None:
            found = fingerprint_of_files(self.skeleton, self.tensors)
            why = "its files are quantised, or laid out otherwise than transformers has it"
        if wanted.fingerprint is None or found is None:
            logger.warning(
                "phatgoose: %s can't be compared with the experts' base, %s, which is taken on "
                "trust: %s.",
                self.name,
                wanted.id,
                "the experts have no fingerprint" if wanted.fingerprint is None else why,
            )
            return False
        check_base(wanted, BaseReference(self.name, self.revision, found))
        return True

    def weight(self, site: str) -> Tensor | None:
        """The whole weight of a layer of the base, None where the files have none of this name."""
        if self.is_made_up or self.skeleton is None:
            return None
        found = tensor_named(self.skeleton, f"{site}.weight", self.tensors)
        return found if found is not None and found.is_floating_point() else None

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
            how: Any = {"cache_dir": self.cache, "local_files_only": True}
            folder = Path(snapshot_download(self.name, revision=self.revision, **how))
        try:
            files = [TensorFile(path) for path in sorted(folder.glob("*.safetensors"))]
        except ExpertError as error:  # of a type that is none of ours, say
            logger.warning("phatgoose: %s", error)
            return {}
        return {name: tensor for file in files for name, tensor in file.items()}
