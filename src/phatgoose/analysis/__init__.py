"""Where tokens went, and what each expert is worth.

analyse.py               the whole analysis, and its result
routing_distribution.py  routing probabilities by site, layer and kind (paper section 4.4)
traces.py                one text, token by token
measures.py              entropy, agreement of routers, divergence from Oracle, leave-one-out
findings.py              warnings, near-duplicates among them
pool_sizes.py            scores as the pool grows
audit.py                 experts that don't look like the others
audit_signs.py           the numbers that an audit compares, from files
"""
