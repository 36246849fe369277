"""Importing: other people's PEFT adapters become experts, as they are or converted, or are refused.

adapter.py        import_adapter
peft_skeleton.py  where an adapter acts, as PEFT resolves its config on a model without weights
to_lora.py        other types of adapter, approximated by a LoRA
hub_owner.py      what of an owner's repositories on the Hub can be routed on one base
"""
