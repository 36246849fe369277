"""Training: make an expert, then its gates and the statistics that other routers need.

train_expert.py       an expert from a task
run.py                the base, data, settings and folder of one training
new_modules/          a base with untrained modules, by kind of expert
gates.py              gates: one vector per module, trained for 100 steps after the expert
joint_gates.py        gates trained together with the expert
router_statistics.py  mean activations and embeddings, for Average Activation and Retrieval
loop.py               the training loop of experts and gates
partial_trainer.py    transformers' Trainer, for a model of which a small part is trained
progress.py           callback and progress bar
processes.py          several processes of one training
unfinished.py         the locked folder of a run that can be resumed
destination.py        where experts go: a directory or a URL
pool_jobs.py          many experts, each one job
planning/             time, memory and disk, worked out beforehand
"""
