"""Where phatgoose keeps what it has made once for this user."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path:
    """`phatgoose` in XDG_CACHE_HOME, or in ~/.cache; it need not be there yet.

    As XDG has it a relative XDG_CACHE_HOME counts for nothing. Raises RuntimeError when nobody
    knows where ~ is.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(named) if os.path.isabs(named) else Path("~/.cache").expanduser()
    return home / "phatgoose"
