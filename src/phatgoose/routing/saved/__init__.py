"""Saved routed models: a folder with a description and the experts' tensors (docs/format.md).

tensors.py   the tensors, in one file or several
save.py      write a routed model
load.py      read one
segments.py  write one larger than memory; add and remove experts
"""
