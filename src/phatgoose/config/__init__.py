"""Settings, as frozen dataclasses: one place for names, defaults, help texts and checks.

settings.py  how a setting works
experts.py   the shapes of experts
training.py  training, gates, examples as tokens
routing.py   routers
serving.py   the server

The command line derives its flags from these classes and recipes (TOML) fill them, so a setting
exists exactly once. Defaults are the paper's (Muqeeth et al. 2024, section 4.1, and the released
code) unless the help text says otherwise.
"""

from .experts import ACTIVATIONS, IA3, KIND_NAMES, PEFT_KINDS, PLACEMENTS, Bottleneck, Lora, Peft
from .routing import (
    AFFINITIES,
    ARROW_FORMS,
    PAPER,
    POOL_SETTINGS,
    ROUTING_SETTINGS,
    Routing,
)
from .serving import Serving
from .settings import (
    Setting,
    Settings,
    from_mapping,
    given_or_default,
    require_one_of,
    settings_of,
)
from .training import (
    EMBEDDING_FORMS,
    TASK_FILES,
    TRUNCATIONS,
    Formatting,
    GateTraining,
    Training,
)

__all__ = [
    "ACTIVATIONS",
    "AFFINITIES",
    "ARROW_FORMS",
    "EMBEDDING_FORMS",
    "IA3",
    "KIND_NAMES",
    "PAPER",
    "PEFT_KINDS",
    "PLACEMENTS",
    "POOL_SETTINGS",
    "ROUTING_SETTINGS",
    "TASK_FILES",
    "TRUNCATIONS",
    "Bottleneck",
    "Formatting",
    "GateTraining",
    "Lora",
    "Peft",
    "Routing",
    "Serving",
    "Setting",
    "Settings",
    "Training",
    "from_mapping",
    "given_or_default",
    "require_one_of",
    "settings_of",
]
