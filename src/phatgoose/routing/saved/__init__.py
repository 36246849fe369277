"""Saved routed models: a folder with a description and the experts' tensors (docs/format.md).

tensors.py  what is in the folder, read strictly
save.py     write a routed model
load.py     read one
change.py   add and remove experts
"""
