"""Examples become tokens: tasks, the paper's datasets, encoding and batches."""
