"""Many machines: jobs on a Ray cluster. Needs the extra 'ray'."""

from .connection import connected
from .engine import RayEngine

__all__ = ["RayEngine", "connected"]
