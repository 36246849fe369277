"""Stacks: the modules of all experts at one site, in one tensor a part.

site_stack.py  SiteStack and its parts
rows.py        experts' rows, joined and taken out
"""
