"""Methods side by side on whole suites, as in the paper's Table 1.

compare.py       runs every method on every dataset
methods.py       the methods, and what each needs of the experts
rows.py          the model that each row composes
cells.py         one row on one dataset, scored where an engine has a worker
shared_answers.py  what single experts answered, for rows that leave inputs to them
code_version.py  a hash of the code that decides what a score is
circumstances.py  when, by which commit and on what machine
result_store.py  finished results in a file of JSON lines
tables.py        the finished comparison, as Markdown, CSV and JSON
"""
