"""The demo: trains five experts on tasks of our own text, routes them, and scores them.

skills.py  the five skills: what each is trained on, and the unseen task that asks for it
demo.py    the whole story, on a laptop, in minutes
gains.py   how far the routed model is above the base and each single expert, with intervals
tasks/     ten tasks as CSV files: five to train on, five of 40 rows to be tested on
"""
