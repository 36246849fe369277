"""Examples become tokens: tasks, the paper's datasets, encoding and batches.

task.py         Example and Task, and where they are loaded from
suites/         the paper's lists of datasets, and one's own
cuts.py         what is kept of an input that is too long
encoding.py     prompts and targets as tokens
row_packing.py  several texts in one row
collating.py    batches as model inputs
embeddings.py   sentence embeddings of inputs
"""
