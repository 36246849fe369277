"""DoRA (Liu et al. 2024), exact on its base."""
