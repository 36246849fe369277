"""Jobs on a Ray cluster of one or many machines. Needs the extra 'ray'.

connection.py  The connection to a Ray cluster; the only module that imports Ray
engine.py      The engine: starts workers, assigns jobs to them, and replaces lost workers
worker.py      A Ray actor that opens a workshop once and does one job after another with it
replicas.py    The server's application on Ray Serve: several replicas behind one address
"""

from .connection import connected
from .engine import RayEngine

__all__ = ["RayEngine", "connected"]
