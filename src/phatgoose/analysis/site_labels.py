"""Where in a model a site is: its stack, its layer, its kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["SiteLabel", "layers_and_kinds", "site_label"]

STACKS = ("encoder", "decoder")


@dataclass(frozen=True)
class SiteLabel:
    """Where a site is.

    `stack` is "encoder" or "decoder" by the module that holds the site, "" in a model of one stack.
    (Keys and values of cross-attention are in the decoder, though they read the encoder's tokens.)
    `layer` counts the blocks of the stack from 0; -1 where the name has no number. `kind` is what
    the site is called in every block, such as "self_attn.q_proj".
    """

    stack: str
    layer: int
    kind: str

    @property
    def layer_name(self) -> str:
        """The layer for people to read: "7", or "encoder 7"."""
        return f"{self.stack} {self.layer}".strip()


def site_label(site: str) -> SiteLabel:
    """The label of a site's module path, such as `model.layers.7.self_attn.q_proj`."""
    parts = site.split(".")
    stack = next((part for part in parts if part in STACKS), "")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return SiteLabel(stack, -1, site)
    kind = [part for part in parts[numbers[0] + 1 :] if not part.isdigit() and part != "layer"]
    return SiteLabel(stack, int(parts[numbers[0]]), ".".join(kind) or site)


def layers_and_kinds(labels: Iterable[SiteLabel]) -> tuple[list[str], list[str]]:
    """(names of the layers, kinds) that occur in `labels`, each once and in order."""
    found = list(labels)
    layers = dict.fromkeys(label.layer_name for label in found)
    return list(layers), list(dict.fromkeys(label.kind for label in found))
