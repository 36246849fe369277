"""The fixtures of phatgoose's own tests, tests/support/shared_fixtures.py."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytest_plugins = ["shared_fixtures"]
