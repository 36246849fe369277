"""Comparisons: methods beside each other on whole suites, as in the paper's Table 1.

cells.py         Cells of a comparison: one model on one dataset, scored where an engine has a worke
code_version.py  The version of the code that decides what a score is: results of another one are ol
compare.py       Methods beside each other on whole suites, the way the paper's Table 1 does it
methods.py       The rows of a comparison: what is composed for each, and what identifies its result
result_store.py  Finished results in a file of JSON lines: appended one by one, found again by their
tables.py        A finished comparison and its tables: Markdown to read, CSV to compute with, JSON f
"""
