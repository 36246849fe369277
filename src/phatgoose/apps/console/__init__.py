"""What a person reads in a terminal.

printing.py  prints text that can't harm the terminal
tables.py    tables of comparisons and analyses
"""
