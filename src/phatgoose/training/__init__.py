"""Training an expert, then its gates and statistics.

train_expert.py  an expert, its gates and statistics in one call
gates.py         gates for an expert that exists (paper section 3), or trained with it (appendix A)
statistics.py    what other routers need: mean activations, readings, embeddings
new_modules.py   a base with untrained modules, by kind of expert
trainer.py       transformers' Trainer over a few tensors, resumable
progress.py      what is said meanwhile
processes.py     several processes of one training
workdir.py       where unfinished work and finished experts lie
pool_jobs.py     many experts
plan.py          steps, memory, time and disk, worked out beforehand
"""
