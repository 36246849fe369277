"""Jobs and copies of the server on a Ray cluster. Needs the extra 'ray'.

engine.py    the engine: starts workers, assigns jobs to them, replaces lost workers
replicas.py  the server's application on Ray Serve: several replicas behind one address
"""

from .engine import RayEngine, connected

__all__ = ["RayEngine", "connected"]
