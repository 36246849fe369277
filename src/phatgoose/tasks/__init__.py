"""Examples become tokens: tasks, the paper's datasets, encoding and batches.

task.py           Example and Task
loading.py        load_task: files, the Hub, rows in memory
suites/           the paper's lists of datasets, and one's own
multitask.py      all tasks as one, for the Multitask model
encoding.py       prompts and targets as tokens
cuts.py           how inputs that are too long are shortened
prompt_passes.py  what a model makes of prompts
neutral.txt       the text
embeddings.py     sentence embeddings of inputs
batching.py       batches as model inputs, several texts in a row, logits of targets only
neutral.py        what a base makes of text as such
"""
