"""Routers that choose one expert for a whole input.

lookup.py           Routers that look the expert of a whole input up: by its nearest neighbour, or b
phatgoose_input.py  One expert for a whole input, chosen by gates: router phatgoose-input
"""
