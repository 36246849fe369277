"""Routers: which experts act, for every token at every site or for a whole prompt.

registry.py   a table of all routers, which loads no torch
router.py     what every router is and does, and the module at each site
prompt.py     the same for routers that choose for a whole prompt
phatgoose.py  the paper's rule, and average activation
fixed.py      routers that don't look at their input; oracle
auto.py       router auto
arrow.py, retrieval.py and others: their formulas; more are in examples/more-routers
"""
