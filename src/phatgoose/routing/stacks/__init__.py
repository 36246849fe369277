"""Stacks: the modules of all experts at one site, in a few tensors.

part.py        what the parts of a stack have in common
lora.py        LoRAs
ia3.py         (IA)³ vectors
bottleneck.py  bottleneck adapters
site_stack.py  all parts of a site
rows.py        rows of experts, joined and taken out
"""
