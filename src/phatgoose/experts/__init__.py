"""An expert, and a pool of them: an adapter on disk with its gates and statistics.

kinds/       what an expert of each kind adds at a site: LoRA, DoRA, (IA)³, bottleneck adapter
adapter.py   which kind a directory holds, and whether it fits a base
expert.py    the expert directory
card.py      its model card, which the Hub shows
readings.py  what it shares of how the base reads its prompts
hub.py       experts on the Hugging Face Hub
pool.py      many experts of one base
importing/   experts made of other people's adapters
"""
