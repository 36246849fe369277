"""Numbers of parameters of a base and of its experts, from the base's config alone."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig, PreTrainedConfig, T5Config

from ...base.loading import load_skeleton
from ...base.sites import find_sites
from ...config import Peft
from ...errors import BaseModelError
from ...experts.readings import readings_size
from ..new_modules.registry import parameters_at, placed_sites

__all__ = ["KNOWN_BASES", "Shapes"]

# The bases of the recipes, for machines that lack their configs.
KNOWN_BASES: dict[str, PreTrainedConfig] = {
    "google/t5-xl-lm-adapt": T5Config(
        d_model=2048,
        d_ff=5120,
        d_kv=64,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=32,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "smollm2": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters, and of the sites that they belong to.

    `expert` and `gates` are those of one expert at `sites` sites, `readings` the numbers that it
    shares of how the base reads prompts. `prompt` and `target` are those
    of the base's linear layers that a prompt's and a target's token passes: logits are computed for
    targets only, and an encoder-decoder model reads prompts in its encoder. `base` counts all of
    the base's parameters, `features` the inputs and outputs of the sites for one token, and
    `vocabulary` its logits. `from_table` says that the base was found in KNOWN_BASES.
    """

    sites: int
    expert: int
    gates: int
    readings: int
    prompt: int
    target: int
    base: int
    features: int
    vocabulary: int
    is_encoder_decoder: bool
    from_table: bool

    @classmethod
    def of(cls, base: str, peft: Peft) -> Shapes:
        """The shapes of an expert `peft` of the base model `base`, by its config or KNOWN_BASES.

        Nothing is downloaded and no weight is read. Raises BaseModelError when neither knows it,
        ConfigError when no site matches.
        """
        try:
            model, from_table = load_skeleton(base), False
        except BaseModelError as error:
            if base not in KNOWN_BASES:
                raise BaseModelError(
                    f"{error} Nothing is downloaded here: have the base's config.json at hand."
                ) from error
            model, from_table = load_skeleton(KNOWN_BASES[base]), True
        chosen, every = placed_sites(model, peft).values(), find_sites(model).values()
        passed = {
            stream: sum(s.in_features * s.out_features for s in every if s.stream == stream)
            for stream in ("encoder", "decoder")
        }
        head = model.get_output_embeddings()
        is_encoder_decoder = bool(model.config.is_encoder_decoder)
        return cls(
            sites=len(chosen),
            expert=parameters_at(model, peft),
            gates=sum(site.in_features for site in chosen),
            readings=readings_size(model.config),
            prompt=passed["encoder" if is_encoder_decoder else "decoder"],
            target=passed["decoder"] + (0 if head is None else head.weight.numel()),
            base=sum(parameter.numel() for parameter in model.parameters()),
            features=sum(site.in_features + site.out_features for site in chosen),
            vocabulary=0 if head is None else head.weight.shape[0],
            is_encoder_decoder=is_encoder_decoder,
            from_table=from_table,
        )
