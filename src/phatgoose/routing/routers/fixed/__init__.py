"""Routers that don't look at their input: the same experts for everything.

merged.py           the mean of all updates
single.py           one expert, named by the user
best_individual.py  the expert with the best mean score
"""
