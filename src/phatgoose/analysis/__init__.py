"""Seeing the routing: where the tokens of a dataset go, and why (METHOD section 7).

analysing.py   analyse(): a routed model, or a pool under several routers, on some tasks
results.py     Analysis: what came out, and its JSON
reading.py     prompt and right answer of every example, passed through once
tally.py       RoutingTally, RoutingProfile: sums over tokens, by site, layer, kind, whole model
measures.py    entropy, concentration, overlap, KL divergence, correlation
agreement.py   how often two routers choose alike
importance.py  what the score loses without an expert
findings.py    what looks wrong with a pool
traces.py      one text, token by token
places.py      stack, layer and kind of a site

docs/analysis.md has the formulas.
"""

from __future__ import annotations

from .analysing import analyse
from .findings import Finding, findings_of, vector_similarity
from .importance import Effect, leave_one_out
from .places import Place, place_of
from .reading import read_examples
from .results import ORACLE, Analysis, RouterAnalysis
from .tally import RoutingProfile, RoutingTally
from .traces import Trace, TraceKeeper, TraceStream, join_streams, trace

__all__ = [
    "ORACLE",
    "Analysis",
    "Effect",
    "Finding",
    "Place",
    "RouterAnalysis",
    "RoutingProfile",
    "RoutingTally",
    "Trace",
    "TraceKeeper",
    "TraceStream",
    "analyse",
    "findings_of",
    "join_streams",
    "leave_one_out",
    "place_of",
    "read_examples",
    "trace",
    "vector_similarity",
]
