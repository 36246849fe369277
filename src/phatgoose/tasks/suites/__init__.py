"""Suites: the paper's lists of datasets to train and evaluate on, and one's own."""
