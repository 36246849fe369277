"""The engine: one thread that computes all answers, in batches.

batches.py    A batch: the rows that one model computes together, a token each per step
caches.py     Keys and values of many rows in one cache: rows come, rows go, and columns of padding
composing.py  Routings that requests ask for, made ready off the engine's thread, one at a time
decoding.py   How an answer is generated: which token comes next, and what is told about it
engine.py     The engine: one thread that computes all answers, a step of every batch in turn
prefill.py    Prompts read: the keys and values of new rows, and what is told about the prompts' tok
rows.py       Rows: answers on their way, each a row of a batch, and what they tell as they grow
runner.py     One pass through a served model, whatever its architecture
texts.py      Text out of tokens that come one at a time, and where it has to end
turns.py      The queue: rows that wait to be computed, of clients who take turns
variants.py   The models that are served: each by its name, and rerouted as requests ask
"""
