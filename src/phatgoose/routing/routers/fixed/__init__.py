"""Routers that don't look at their input.

unscored.py  Routers that do not look at the token: the same weights for all, or chance
"""
