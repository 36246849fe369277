"""Suites: the paper's lists of datasets to train and evaluate on, and one's own.

registry.py    the suites known by name, and how any suite is opened
entries.py     Suite, Entry, Sources: datasets not loaded yet, and where their files are
t0.py          t0hi and t0ho: T0 held-in and held-out, in P3's prompts
t0.toml        their datasets
flan.py        flan: 166 datasets, T0 held-in among them
flan.toml      the other 130
bigbench.py    bbh and bbl: BIG-bench Hard and Lite
bigbench.toml  their tasks
p3.py          examples from rows and prompt templates
hub.py         rows of a dataset from the Hub, or from a local copy of its files
"""
