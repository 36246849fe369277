"""An expert, and a pool of them: an adapter on disk with its gates and statistics.

kinds/          what an expert adds at a site: LoRA, (IA)³, bottleneck adapter
adapter.py      which kind a directory holds, and whether it fits a base
expert.py       the expert directory
applied.py      one expert alone on its base
input_format.py the form of the inputs that it was trained on
card.py         its model card
hub.py          its place on the Hugging Face Hub
pool.py         many experts of one base
importing/      adapters of others, made experts
"""
