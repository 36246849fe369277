"""New modules: a base with untrained modules at the sites of an expert, by kind.

fresh.py        what all kinds share: an expert in training, a record of the kind, PEFT's model
lora.py         new LoRAs
ia3.py          new (IA)³ vectors
bottleneck.py   new bottleneck adapters
registry.py     the records of all kinds, and the questions that they answer
"""
