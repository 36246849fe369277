"""Routers: which experts act, for every token at every site or for a whole prompt.

registry.py       every router as one record
router.py         what a router is: for a model, and at each site
vector_router.py  one vector for each expert, the top k of a score
affinities.py     other scores of vectors and activations than the paper's
prompt_router.py  routers that choose for a whole prompt, and what they read it by
bounds.py         no single expert decides what a pool shares
automatic.py      router auto
phatgoose.py, average_activation.py, arrow.py, merged and others: one router in each file
"""
