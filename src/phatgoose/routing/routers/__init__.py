"""Routers: which experts act on a token at a site, and with which weights.

registry.py  every router by its name
decision.py  what a router answers, and the rule for ties
scores.py    every expert's score on every task
per_token/   routers that choose for every token
per_input/   routers that choose for a whole input
fixed/       the same experts for everything
"""
