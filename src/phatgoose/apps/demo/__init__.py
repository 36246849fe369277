"""The demo: train five experts on tasks of our own text, route them, and look.

arithmetic.py  Arithmetic: bare sums and differences to train on, short stories to be tested on
category.py    Category: naming a thing's kind to train on, finding the odd one out to be tested on
demo.py        The demo: the whole story on five small tasks of our own, on a laptop, in minutes
drawing.py     What all demo tasks share: drawing balanced, distinct rows, and small points of Engli
entailment.py  Entailment: premise and hypothesis to train on, passage and statement to be tested on
ordering.py    Ordering: sizes, numbers, durations and the alphabet to train on, time to be tested o
sentiment.py   Sentiment: film and product reviews to train on, hotel comments to be tested on
tasks.py       The demo's tasks: original English text, five tasks to train on and five to be tested
"""
