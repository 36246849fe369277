"""`python -m phatgoose`: the command line."""

from .apps.cli import main

main()
