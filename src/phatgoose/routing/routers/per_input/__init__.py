"""Routers that choose one expert for a whole input.

looked_up.py        the frame: the expert of each row of a batch
prompt_reader.py    lookups that read the prompts passing the model
retrieval.py        the nearest training input's expert
oracle.py           the task's best expert
phatgoose_input.py  the expert whose gates fit best on average
"""
