"""Kinds of experts: what each adds at a site, and how its adapter is stored.

modules.py     LoraFactors, ScalingVector, BottleneckLayers
peft_files.py  LoRA and (IA)³ in PEFT's files
bottleneck.py  bottleneck adapters in files of our own
"""
