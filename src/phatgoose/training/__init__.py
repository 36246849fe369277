"""Training: make an expert, then its gates and the statistics that other routers need.

train_expert.py       an expert from a task
new_modules/          its modules before training
gates.py              one gate per module, trained for 100 steps
router_statistics.py  mean activations and embeddings
loop.py               the training loop of experts and gates
processes.py          several processes of one training
unfinished.py         the folder of a run that can be resumed
destination.py        where experts are put: a directory or a URL
pool_jobs.py          many experts, each one job
planning/             time and memory, worked out beforehand
"""
