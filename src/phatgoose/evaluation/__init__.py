"""Scores of a model on tasks (`evaluate`), and of many methods side by side (`compare`)."""
