"""A pool becomes one routed model: layers that choose experts for every token.

routers/        which experts act on a token, and how much
stacks/         all experts' modules of a site in one tensor a part
kernels/        the routed product
layers.py       routed linear layers
mixed_layer.py  the same for experts of several kinds
soundness.py    whether a site's tensors fit together
composition.py  what a routed model is made of
compose.py      compose and detach
recording.py    what was decided, token by token
growing.py      experts that join and leave
saved/          routed models in folders
open_model.py   a model, pool, expert or base, whichever a place holds
"""
