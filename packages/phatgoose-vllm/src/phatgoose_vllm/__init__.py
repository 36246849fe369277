"""Exact per-token routing inside vLLM, as a plugin: docs/engines.md.

    PHATGOOSE_MODEL=routed vllm serve BASE

vLLM finds `register` by our entry point in its group "vllm.general_plugins" and calls it in each of
its processes. Then `layers` puts routed layers in place of vLLM's linear ones, `served` opens
the experts and says which share of them a layer gets, and `op` is what a layer calls.

This file imports nothing: an entry point that can't be imported is a line in vLLM's log, and the
base would answer in place of the routed model. What `register` raises ends vLLM.
"""

from __future__ import annotations

import os


def register() -> None:
    """Serve what PHATGOOSE_MODEL names; without it change nothing.

    Raises ConfigError where it names no routed folder.
    """
    if os.environ.get("PHATGOOSE_MODEL"):
        from .layers import replace_layers

        replace_layers()
