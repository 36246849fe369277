"""The frozen model that experts are trained on.

loading.py         load it, by name or folder
sites.py           its linear layers: where experts act
blocks.py          its blocks
token_masks.py     which tokens of a pass are real
fingerprint.py     whether two bases are the same, and whether one has changed
offloading.py      weights that wait elsewhere
untrusted_text.py  its chat template and tokenizer, run in a process of their own
text_process.py    that process
smollm2.py         the bundled base
"""
