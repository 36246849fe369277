"""What transformers' auto classes make of a saved routed model's folder.

`import phatgoose` registers it (`phatgoose.__init__`). What `from_pretrained` returns is the base's
own class, routed, as `load` returns it; no code comes from the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig

from ...config import MODEL_TYPE
from ...errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WHERE = ("cache_dir", "local_files_only", "revision", "token")  # of a repository on the Hub
# What the auto classes hand on beside what they were given, and `load` has no use for.
HANDED_ON = {"adapter_kwargs", "code_revision", "trust_remote_code", "use_safetensors", *WHERE}


class RoutedConfig(PretrainedConfig):  # type: ignore[misc]
    """The config.json of a saved routed model, which only says that it is one."""

    model_type = MODEL_TYPE


class RoutedModel:
    """The class that is registered for `RoutedConfig`; there are no objects of it."""

    config_class = RoutedConfig

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        *,
        config: RoutedConfig | None = None,
        dtype: str | torch.dtype = "auto",
        torch_dtype: str | torch.dtype | None = None,
        **given: Any,
    ) -> PreTrainedModel:
        """What `load` returns for a folder, or a repository on the Hub, of a saved routed model.

        Raises ConfigError for arguments that a routed model can't be loaded with, and what `load`
        does.
        """
        # Loads torch, which registering needn't.
        from huggingface_hub import snapshot_download

        from .load import load

        where: dict[str, Any] = {name: given[name] for name in WHERE if name in given}
        if config is not None:  # which the auto classes have put some arguments into
            plain = cls.config_class.from_pretrained(place, trust_remote_code=False, **where)
            given |= _changed(config, plain)
        if others := sorted(n for n in given if n not in HANDED_ON and not n.startswith("_")):
            raise ConfigError(
                f"A routed model can't be loaded with {', '.join(others)}; load the base with it, "
                f"and hand it over: phatgoose.load(folder, base)."
            )
        if not Path(place).is_dir():
            place = snapshot_download(str(place), **where)
        return load(place, dtype=str(torch_dtype or dtype).removeprefix("torch."))


def _changed(config: PretrainedConfig, plain: PretrainedConfig) -> dict[str, Any]:
    """What `config` says otherwise than `plain`, by name."""
    found = {name: value for name, value in vars(config).items() if vars(plain).get(name) != value}
    found.pop("dtype", None)  # it is among the arguments too
    attention = found.pop("_attn_implementation_internal", None)
    return found if attention is None else {**found, "attn_implementation": attention}


def register() -> None:
    """Make transformers' auto classes know saved routed models."""
    AutoConfig.register(MODEL_TYPE, RoutedConfig, exist_ok=True)
    for each in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        each.register(RoutedConfig, RoutedModel, exist_ok=True)
