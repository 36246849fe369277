"""Export: a routed model whose routing is constant, for programs that know nothing of ours.

export.py   the folder that is written, and how near it is to the routed model
shares.py   the constant share of each expert at each site
updates.py  the sum of the updates at a site
"""
