"""A pool of experts becomes one routed model.

compose.py       put the pool into the base; save, load
opening.py       open a pool, a saved model or a base alike
choice.py        what is chosen for prompts, and who chooses
chooser.py       the choice alone, for programs with an engine of their own
conversation.py  which of a chat's texts chooses
context.py       the experts of the present batch
tails.py         where those are active that act from a prompt's end on
stacks.py        the modules of all experts at one site
layers.py        the routed layers
routers/         who chooses: one file for each router
kernels/         how the sum of the chosen updates is computed
recording.py     callbacks for what layers decide, and every decision about a text
saved.py         the folder of a routed model: checked, grown, shrunk
export.py        constant routing as a PEFT adapter or a plain model
"""
