"""Routers that choose experts for every token, at every site.

vector_router.py       the frame: one vector per expert, the top k of an affinity
affinities.py          five ways to score activations against gates or means
phatgoose.py           gates: the paper's method
shortlisted.py         gates, among the experts that fit the prompt
stand_in.py            stand-ins for missing gates
average_activation.py  mean training activations
arrow.py               the direction that an expert stretches most
spectr.py              all directions that an expert looks at
glider.py              gates, and how near the whole input is to an expert's
uniform_top_k.py       PHATGOOSE's experts, equal weights
random_experts.py      chance
"""
