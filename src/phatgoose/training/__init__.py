"""Training an expert, then its gates and statistics.

train_expert.py  an expert in three stages: adapter, gates (paper section 3), statistics
modules.py       new modules of each kind, and modules behind gates
statistics.py    what other routers need: mean activations, readings, embeddings
trainer.py       transformers' Trainer over a few tensors, resumable, in several processes
workdir.py       where unfinished work and finished experts lie
pool_jobs.py     many experts
plan.py          steps, memory, time and disk, worked out beforehand
"""
