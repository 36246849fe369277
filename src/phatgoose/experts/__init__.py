"""An expert, and a pool of them: an adapter on disk with its gates and statistics.

kind.py        what each kind has: modules at sites, new ones in training, a stack of many
registry.py    the kinds as records, which load no torch
lora.py, dora.py, ia3.py, bottleneck.py
peft_files.py  PEFT's two files, and what is refused of them
expert.py      the expert directory, and its model card
statistics.py  what it shares of how the base reads its prompts
importing.py   experts made of other people's adapters
convert.py     other types of adapter, approximated by a LoRA
hub.py         experts on the Hugging Face Hub
pool.py        many experts of one base
"""
