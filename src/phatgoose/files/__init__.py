"""Files: read what strangers wrote strictly, write all or nothing.

strict_json.py  JSON and TOML of bounded size, from regular files
regex_guard.py  strangers' regular expressions, in linear time
tensor_file.py  safetensors files as views of their mapping
prefetch.py     the next item is made while this one is used
atomic.py       files and folders that appear by one rename
left_overs.py   temporary names, and what killed runs left under them
"""
