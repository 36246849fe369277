"""Sites of the golden experts."""

from __future__ import annotations

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
