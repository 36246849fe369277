"""Planning: what a training run will cost in time and memory.

plan.py      plan_training
sizes.py     numbers of parameters, from the base's config
speed.py     how fast a worker trains
trial.py     that speed, measured
schedule.py  a plan over several workers
"""
