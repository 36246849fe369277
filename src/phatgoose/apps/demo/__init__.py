"""The demo: trains five experts on tasks of our own text, routes them, and scores them.

demo.py  the whole story on small tasks of our own, on a laptop, in minutes
tasks/   ten tasks as CSV files: five to train on (400 rows), five to be tested on (100 rows)
"""
