"""The frozen base model: load it, find its sites, know which of its tokens are real.

loading.py      a model by id or folder, in a fitting precision, recognised by fingerprint
sites.py        the linear layers at which experts act
positions.py    how many tokens the base can tell apart by position
token_masks.py  which tokens are padding
offloading.py   weights that accelerate keeps elsewhere between passes
"""
