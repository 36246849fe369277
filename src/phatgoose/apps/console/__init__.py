"""What a person reads in a terminal.

printing.py           text that no terminal can be hurt by
comparison_tables.py  tables of a comparison
analysis_tables.py    tables of an analysis
"""
