"""The demo: train five experts on tasks of our own text, route them, and look.

demo.py  The demo: the whole story on small tasks of our own, on a laptop, in minutes
tasks/   Ten tasks as CSV files: five to train on (400 rows), five to be tested on (100 rows)
"""
