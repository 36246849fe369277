"""Every error that phatgoose raises on purpose, as one tree.

PhatgooseError
  + ConfigError       a setting, recipe key or command-line value that can't be used
  + BaseModelError    a base model that can't be found, loaded or recognised
  + TaskError         a dataset, template or example that can't be used
  + ExpertError       an expert directory or adapter that is missing, damaged or unsupported
    x WrongBaseError  an expert that was trained on another base model
  + PoolError         a collection of experts that doesn't fit together
  + RoutingError      something that a routed model can't do
  + EvaluationError   a score that can't be computed
  + EngineError       workers that can't be started, or that stay lost

Each message is one or two sentences in the user's terms: what was found, what was wanted, what to
do. The command line prints it on one line and exits with status 2.
"""

from __future__ import annotations

__all__ = [
    "BaseModelError",
    "ConfigError",
    "EngineError",
    "EvaluationError",
    "ExpertError",
    "PhatgooseError",
    "PoolError",
    "RoutingError",
    "TaskError",
    "WrongBaseError",
]


class PhatgooseError(Exception):
    """The root of every error that phatgoose raises on purpose."""


class ConfigError(PhatgooseError):
    """A setting, recipe key or command-line value that can't be used."""


class BaseModelError(PhatgooseError):
    """A base model that can't be found, loaded or recognised."""


class TaskError(PhatgooseError):
    """A dataset, template or example that can't be used."""


class ExpertError(PhatgooseError):
    """An expert directory or adapter that is missing, damaged or unsupported."""


class WrongBaseError(ExpertError):
    """An expert that was trained on another base model than the one at hand."""


class PoolError(PhatgooseError):
    """A collection of experts that doesn't fit together."""


class RoutingError(PhatgooseError):
    """Something that a routed model can't do."""


class EvaluationError(PhatgooseError):
    """A score that can't be computed."""


class EngineError(PhatgooseError):
    """Workers that can't be started, or that stay lost."""
