"""Many machines: jobs on a Ray cluster. Needs the extra 'ray'.

connection.py  The connection with a Ray cluster; the one module that imports Ray
engine.py      The engine on Ray: workers that are hired, given jobs, and replaced when they are los
replicas.py    The server's application on Ray Serve: several replicas of it behind one address
worker.py      A worker: a Ray actor that opens a workshop once and does one job after the other wit
"""

from .connection import connected
from .engine import RayEngine

__all__ = ["RayEngine", "connected"]
