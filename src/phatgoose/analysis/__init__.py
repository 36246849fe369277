"""Seeing the routing: where the tokens of a dataset go, and why (METHOD section 7).

agreement.py             How often routers choose alike, token by token: their decisions are kept in
analyse.py               The analysis of a routed model, or of one pool under several routers
findings.py              What looks wrong with a routed model, in words that help
importance.py            Which experts matter: what the score loses without each of them
measures.py              Measures of routing distributions, as docs/analysis.md states them; all log
near_duplicates.py       Experts that are nearly the same: what a large pool collects without being
places.py                Where in a model a site is: its stack, its layer, its kind
pool_sizes.py            Scores against the size of the pool, from the finished cells of comparisons
reading.py               Reading a dataset with a routed model: prompt and right answer of every exa
result.py                What an analysis found, and its form in JSON
routing_distribution.py  Routing decisions summed up as they pass: memory does not grow with the num
traces.py                One text, token by token: which experts served it at every site, small enou
"""
