"""Answers of another engine: which it is, how it is reached, and who chooses its experts."""
