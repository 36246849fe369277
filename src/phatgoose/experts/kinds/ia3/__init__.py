"""(IA)³ (Liu et al. 2022)."""
