"""P3's templates where they are at hand, and a made-up record for each dataset."""

import json
from pathlib import Path

import pytest

from paths import SHARED

P3 = SHARED / "data/p3_templates"
RECORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
needs_p3 = pytest.mark.skipif(not P3.is_dir(), reason=f"no P3 templates in {P3}")
