"""The demo: trains five experts on tasks of our own text, routes them, and scores them.

demo.py  the five skills, the story, and how far the routed model is above the rest
tasks/   ten tasks as CSV files: five to train on, five of 40 rows to be tested on
"""
