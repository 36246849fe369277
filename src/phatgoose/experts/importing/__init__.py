"""Importing: PEFT adapters of others, made experts, converted or refused.

adapter.py        import_adapter
refusals.py       what can't be routed, and why
peft_skeleton.py  PEFT's own reading of a config, on a model without weights
to_lora.py        other kinds, approximated by a LoRA
"""
