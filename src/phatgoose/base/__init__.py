"""The frozen base model: load it, find its sites, know which of its tokens are real.

loading.py         a model and its tokenizer, by Hub id or folder, in a fitting dtype
smollm2.py         the embedded base "smollm2"
fingerprint.py     which base is it? recognised by its weights
sites.py           the linear layers at which experts act
blocks.py          the layers that a prompt passes in turn
positions.py       how many tokens the base can tell apart by position
token_masks.py     which tokens are padding
detokenising.py    tokens as text again
untrusted_text.py  a base's chat template and tokenizer, in a process with limits
text_process.py    what that process runs
offloading.py      weights that accelerate keeps elsewhere between passes
"""
