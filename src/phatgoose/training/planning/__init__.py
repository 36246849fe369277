"""Planning: what a training run will cost in time, memory and disk.

plan.py     plan_training: the costs of many experts, with what was assumed
costs.py    the costs of one expert
sample.py   the examples whose tokens are counted
sizes.py    numbers of parameters, from the base's config
speed.py    how fast a worker trains, given or measured
schedule.py a plan spread over workers
"""
