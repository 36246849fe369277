"""Files: read what strangers wrote strictly, write all or nothing.

regular_file.py  regular files inside their own folder, and their hashes
strict_json.py   JSON of bounded size and depth
strict_toml.py   TOML of bounded size and depth
quoting.py       strangers' words in our error messages
encodable.py     text that no UTF-8 can hold
regex_guard.py   strangers' regular expressions, in linear time
tensor_file.py   safetensors files as views of their mapping
prefetch.py      compute the next items while this one is used
atomic.py        files and folders that appear by one rename
left_overs.py    temporary names, and what killed runs left under them
user_cache.py    where things made once for a user are kept
"""
