"""Kinds of experts: each a folder, and a record in the registry (docs/extending.md).

registry.py   the records
kind.py       what every kind has: modules at sites, files, new modules, stacks, sums
peft.py       PEFT's files and models, which LoRA and (IA)³ share
lora/  dora/  ia3/  bottleneck/    module.py, training.py, stack.py
"""
