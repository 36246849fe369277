"""The frozen model that experts are trained on: load it, find its sites, know its padding."""
