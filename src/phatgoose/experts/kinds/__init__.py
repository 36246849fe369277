"""Kinds of experts: what each adds at a site, and how its adapter's files are read and written.

kind.py        what all kinds have: a module at a site, two files, a record
lora.py        LoRA
ia3.py         (IA)³
bottleneck.py  bottleneck adapters, in files of our own
peft.py        PEFT's files, which these two share, and adapters that can't be routed
"""
