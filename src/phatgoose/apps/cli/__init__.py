"""The `phatgoose` command: one subcommand per stage of the story.

analysis.py     Commands to see the routing: analyse, explain
comparison.py   Commands of researchers: compare, lm-eval
engines.py      Flags that say where work is done, and the engine that they stand for
experts.py      Commands of contributors: train, gate, measure, check
explanation.py  One prompt explained: who served each of its tokens, for the terminal and as JSON
flags.py        Command-line flags derived from the config dataclasses: defined once, described once
main.py         The command's frame: the app, and how errors, warnings and interruptions reach the u
plan.py         What `phatgoose train --plan` shows: a table of experts to be trained, and what was
recipe.py       Recipes: settings and tasks in a TOML file, one table for each class of settings
routed.py       Commands of aggregators: pool, compose, generate, evaluate, demo
segments.py     Commands that change a routed model's folder: add, remove, compact
serving.py      The command of operators: serve
sharing.py      Commands of sharing: import, push, pull
"""

from .main import app, main

__all__ = ["app", "main"]
