"""The `phatgoose` command: one subcommand per stage of the story."""

from .main import app, main

__all__ = ["app", "main"]
