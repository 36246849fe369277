"""DoRA (Liu et al. 2024), imported from PEFT and exact on its base."""
