"""Files: those of others read strictly, ours written all or nothing.

strict.py       JSON, TOML and paths; what is quoted of them in messages
tensor_file.py  safetensors as views of their mapping
regex_guard.py  patterns of others
entry_points.py what other packages registered with us
atomic.py       files and folders that appear complete, and what interrupted writing left
"""
