"""The `phatgoose` command: one subcommand for each stage of the story.

main.py         all subcommands; how errors, warnings and interruptions reach the user
experts.py      commands of contributors: train, gate, measure, check
plan.py         train --plan
sharing.py      commands of sharing: import, push, pull, export
routed.py       commands of aggregators: pool, compose, generate, evaluate, demo
serving.py      the command of operators: serve
options.py      options that several commands share; flags and recipes made of dataclasses
evaluation.py   commands of researchers: compare, lm-eval, analyse, explain
explanation.py  one prompt explained, token by token
"""

from .main import app, main

__all__ = ["app", "main"]
