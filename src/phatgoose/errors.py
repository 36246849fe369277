"""Every error that phatgoose raises on purpose, as one tree.

A message says what was found, what was expected and what to do, in a line or two.
"""


class PhatgooseError(Exception):
    """The root of every error that phatgoose raises on purpose."""


ErrorKind = type[PhatgooseError]


class ConfigError(PhatgooseError):
    """A setting, recipe key or command-line value that can't be used."""


class BaseModelError(PhatgooseError):
    """A base model that can't be found, loaded or recognised."""


class TaskError(PhatgooseError):
    """A dataset, template or example that can't be used."""


class ExpertError(PhatgooseError):
    """An expert directory or adapter that is missing, damaged or unsupported."""


class TrainingError(ExpertError):
    """A training that failed: its losses aren't finite any more."""


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
