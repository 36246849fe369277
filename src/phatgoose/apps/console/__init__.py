"""What a person reads in a terminal.

printing.py  prints text that can't harm the terminal
tables.py    tables of pools, scores, comparisons and analyses
colours.py   tokens in the colours of their experts
"""
