"""Routers: which experts act on a token at a site, and with which weights.

registry.py  every router as one record
automatic.py the router for who names none
router.py    what a router is, for a model and at a site
decision.py  what a router answers, and the rule for ties
lookup.py    which experts serve each whole input
bounds.py    what one expert may add to statistics of the pool, at most
mixtures.py  the experts of some inputs, with their weights
scores.py    every expert's score on every task
per_token/   routers that choose for every token
per_input/   routers that choose experts for a whole input
fixed/       the same experts for everything
"""
