"""Jobs and copies of the server on a Ray cluster. Needs the extra 'ray'.

connection.py  the connection to a Ray cluster; the only module that imports Ray
engine.py      the engine: starts workers, assigns jobs to them, replaces lost workers
worker.py      a Ray actor that opens a workshop once and does one job after another with it
replicas.py    the server's application on Ray Serve: several replicas behind one address
"""

from .connection import connected
from .engine import RayEngine

__all__ = ["RayEngine", "connected"]
