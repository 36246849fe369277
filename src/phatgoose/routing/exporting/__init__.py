"""Exporting: a routed model whose routing is constant becomes a PEFT adapter or a plain model.

texts.py     the prompts that a mixture is chosen for, as the model reads them
opening.py   a routed model or a pool, with every factor
shares.py    the constant share of each expert at each site
updates.py   what a site's experts come to at these shares: factors, or a changed layer
fidelity.py  how far the export's logits are from the routed model's
export.py    export: the folder
"""
