"""LoRA (Hu et al. 2021; paper section 3)."""
