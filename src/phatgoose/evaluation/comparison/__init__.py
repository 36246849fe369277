"""Methods side by side on whole suites, as in the paper's Table 1.

compare.py       runs every method on every dataset
methods.py       the methods, and what each needs of the experts
cells.py         one row on one dataset, scored where an engine has a worker
result_store.py  finished results in a file of JSON lines
tables.py        the finished comparison, as Markdown, CSV and JSON
"""
