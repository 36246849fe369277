"""The fixtures of phatgoose's own tests, tests/support/shared_fixtures.py."""

from __future__ import annotations

import os

# Both are read on import, the first when torch imports triton.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["shared_fixtures"]
