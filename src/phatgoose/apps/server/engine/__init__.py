"""The engine: one thread that generates all answers, in batches.

generation_engine.py  The thread: admits queued sequences and steps every batch in turn
fair_queue.py         Sequences that wait to be computed; clients take turns
batches.py            Sequences that one model computes together, one token each per step
sequences.py          One answer while it is generated, and the events it emits
prefill.py            Reading prompts: keys, values and what is reported about prompt tokens
model_runner.py       One forward pass of a served model, whatever its architecture
caches.py             Keys and values of many sequences in one cache
decoding.py           Choosing the next token, and log-probabilities of alternatives
detokeniser.py        Text from tokens that come one at a time, and stop texts
loaded_models.py      The served models
routing_cache.py      The routings that requests ask for, composed off the engine's thread
"""
