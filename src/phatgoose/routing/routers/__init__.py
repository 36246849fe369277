"""Routers: which experts act, for every token at every site or for a whole prompt.

registry.py       every router as one record, and its settings as text
configs.py        the settings of each router
router.py         what a router is: for a model, and at each site
phatgoose.py      the paper's rule, and average activation
fixed.py          routers that don't look at their input; oracle
prompt_router.py  routers that choose for a whole prompt, and what they read it by
automatic.py      router auto
arrow.py, retrieval.py and others: one router in each file; more are in examples/more-routers
"""
