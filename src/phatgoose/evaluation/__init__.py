"""Scores of a model on tasks, and of many methods side by side.

likelihood.py  log-likelihoods of answer choices
answers.py     the best choice, or generated text
metrics.py     what an answer is worth
intervals.py   how far a score may move
evaluate.py    zero-shot scores
comparison/    methods beside each other on suites
"""
