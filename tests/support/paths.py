"""Where the repository lies, and what tests read of it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "golden"  # one expert directory of each kind
GOLDEN = GOLDENS / "expert"
SHARED = ROOT.parent / "shared"  # data of this project's machines, absent elsewhere
