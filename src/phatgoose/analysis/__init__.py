"""Where a routed model sends the tokens of a dataset, and why (paper section 4.4).

analyse.py               the analysis of a routed model, or of one pool under several routers
reading.py               reads prompt and right answer of every example with a routed model
routing_distribution.py  routing probabilities averaged over the tokens of a dataset
site_labels.py           stack, layer and kind of a site
measures.py              entropy, effective experts, load, concentration, overlap
kl_to_oracle.py          divergence from Oracle's distribution, and its correlation with scores
agreement.py             how often routers agree, token by token
importance.py            how much the score falls without each expert
findings.py              what looks wrong with a routed model
audit/                   experts of a pool that don't look like the others
near_duplicates.py       experts of a pool that are nearly the same
pool_sizes.py            scores against the size of the pool
traces.py                one text, token by token: its experts at every site
result.py                what an analysis found, and its JSON
"""
