"""The engine: one thread that generates all answers, in batches.

generation_engine.py  the thread: admits queued sequences and steps every batch in turn
fair_queue.py         sequences that wait to be computed; clients take turns
batches.py            sequences that one model computes together, one token each per step
sequences.py          one answer while it is generated, and the events it emits
prefill.py            prompts read: keys, values and what is reported about prompt tokens
model_runner.py       one forward pass of a served model, whatever its architecture
caches.py             keys and values of many sequences in one cache
decoding.py           the choice of the next token, and log-probabilities of alternatives
stop_texts.py         where an answer ends before its last token
loaded_models.py      the served models
routing_cache.py      routings that requests ask for, composed off the engine's thread
"""
