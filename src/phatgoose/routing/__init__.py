"""A pool becomes one routed model, whose layers choose experts for every token.

routers/        which experts act on a token, and how much
kernels/        the routed product
stacks/         all experts' modules of a site
soundness.py    checks that a site's tensors fit together
watching.py     callbacks for what layers decide
layers.py       linear layers that add their experts' updates
composition.py  what a routed model is made of
compose.py      compose and detach
recording.py    every decision about a text
growing.py      experts that join and leave
saved/          routed models in folders
open_model.py   a model from a routed folder, a pool, an expert or a base
exporting/      a routed model becomes a PEFT adapter or a plain model
"""
