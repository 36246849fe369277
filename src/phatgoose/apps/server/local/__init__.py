"""A served model computed here: the engine, its batches, and what they keep."""
