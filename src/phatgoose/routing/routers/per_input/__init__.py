"""Routers that choose one expert, or several with weights, for a whole input.

looked_up.py           the frame: the experts of each row of a batch
prompt_reader.py       lookups that read the prompts passing the model
base_reader.py         those that go by what the base makes of a prompt
embedding_reader.py    those that go by its embedding
retrieval.py           the nearest training input's expert
centroid.py            the experts with the nearest mean training input
oracle.py              the task's best expert
logo.py                the experts whose updates are longest at the prompt's end
phatgoose_input.py     the expert whose gates fit best on average
discriminant.py        the expert whose training prompts the base reads alike
joint_discriminant.py  the expert whose training prompts base and embedder read alike
remembered_states.py   what the base made of prompts, for several discriminants
"""
