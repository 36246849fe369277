"""Routers that choose experts for every token, at every site.

affinities.py  Other ways to hold gates (or mean activations) against activations than the paper's
arrow.py       Arrow's vectors: the direction in which an expert stretches its input most (METHOD se
scored.py      Routers that score every token against one vector per expert (METHOD sections 4 and 5
stand_in.py    Stand-ins for gates that nobody trained, so that their experts can join a pool of gat
"""
