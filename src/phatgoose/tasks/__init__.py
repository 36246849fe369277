"""Examples become tokens: tasks, the paper's datasets, encoding and batches.

task.py           Example and Task
loading.py        load_task: files, the Hub, rows in memory
templates.py      the user's prompt templates
suites/           the paper's lists of datasets, and one's own
multitask.py      all tasks as one, for the Multitask model
encoding.py       prompts and targets as tokens
cuts.py           how inputs that are too long are shortened
collating.py      batches as model inputs
row_packing.py    several texts in one row
target_logits.py  the logits of target tokens only
prompt_passes.py  what a model makes of prompts
neutral_text.py   what a base makes of text as such
neutral.txt       the text
embeddings.py     sentence embeddings of inputs
"""
