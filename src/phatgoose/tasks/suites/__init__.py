"""Suites: the paper's lists of datasets to train and evaluate on, and one's own.

bigbench.py        BIG-bench Hard and Lite as the paper evaluates on them (Muqeeth et al. 2024, sect
bigbench.toml
entries.py         What a suite is: named datasets that are not loaded yet, and where their files ar
flan.py            The paper's FLAN pool: 166 datasets (Muqeeth et al. 2024, section 4.1 and the rel
flan.toml
hub.py             Rows of datasets from the Hugging Face Hub, or from local copies of their reposit
local.py           Suites of one's own: a folder of task files, or a TOML file that lists them
promptsource.py    Prompt templates in promptsource's files, read and rendered without the package
registry.py        Suites: the paper's lists of datasets to train and evaluate on, and one's own
t0.py              The T0 suites: 36 datasets to train experts on (held-in) and 11 to evaluate on (h
t0.toml
training_tasks.py  What may be named to train on: a suite, one dataset of it, a task file, a dataset
"""
