"""The `phatgoose` command: one subcommand for each stage of the story."""

from .main import app, main

__all__ = ["app", "main"]
