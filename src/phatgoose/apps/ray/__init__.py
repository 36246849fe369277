"""Jobs (`engine`) and copies of the server (`replicas`) on a Ray cluster. Needs the extra 'ray'."""

from .engine import RayEngine, connected

__all__ = ["RayEngine", "connected"]
