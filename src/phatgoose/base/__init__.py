"""The frozen model that experts are trained on.

identity.py      what a base is, and which one: a hash of its weights
loading.py       load it, its tokenizer, or the model without weights
smollm2.py       the embedded one, made of a GGUF file
detokenising.py  its tokens become text
"""

NO_CODE = {"trust_remote_code": False}  # left out, transformers asks, and a pipe may answer yes
