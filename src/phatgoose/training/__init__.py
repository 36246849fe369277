"""Training an expert, then its gates and statistics.

train_expert.py  an expert in three stages: adapter, gates (paper section 3), statistics
trainer.py       transformers' Trainer over a few tensors, resumable
pool_jobs.py     many experts
"""
