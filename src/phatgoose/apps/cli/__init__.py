"""The `phatgoose` command: one subcommand for each stage of the story.

main.py         all subcommands; how errors, warnings and interruptions reach the user
flags.py        flags made of dataclasses
options.py      options that several commands share
recipe.py       recipes: settings and tasks in a TOML file
experts.py      commands of contributors: train, gate, measure, check
plan.py         train --plan
sharing.py      commands of sharing: import, push, pull, export
routed.py       commands of aggregators: pool, compose, generate, evaluate, demo
segments.py     commands that change a routed model's folder: add, remove, compact
comparison.py   commands of researchers: compare, lm-eval
analysis.py     commands to see the routing: analyse, explain
explanation.py  the experts behind each token of one prompt
serving.py      the command of operators: serve
"""

from .main import app, main

__all__ = ["app", "main"]
