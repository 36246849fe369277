"""New modules: a base with untrained modules at the sites of an expert's kind.

placement.py  where each kind acts
fresh.py      the modules themselves
"""
