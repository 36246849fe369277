"""Which experts of a pool don't look like the others.

signs.py    numbers of each expert that an attack would change, from its files
neutral.py  the same from what the base makes of neutral text
audit.py    signs that are beyond their limits, in words
"""
