"""Training an expert, then its gates and statistics.

train_expert.py  an expert in three stages: adapter, gates (paper section 3), statistics
gates.py         a module behind a gate; gates trained with the expert (appendix A)
statistics.py    what other routers need: mean activations, readings, embeddings
new_modules.py   a base with untrained modules, by kind of expert
trainer.py       transformers' Trainer over a few tensors, resumable, in several processes
workdir.py       where unfinished work and finished experts lie
pool_jobs.py     many experts
plan.py          steps, memory, time and disk, worked out beforehand
"""
