"""Scores of a model on tasks, and of many methods side by side.

evaluate.py    the zero-shot scores of a model
likelihood.py  log-likelihoods of answer choices
metrics.py     how well an answer matches the accepted ones
intervals.py   how far a score moves with other examples or datasets
comparison/    methods side by side on suites
"""
