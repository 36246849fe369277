"""Bottleneck adapters (Houlsby et al. 2019)."""
