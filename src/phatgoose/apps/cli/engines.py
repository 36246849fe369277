"""Flags that say where work is done, and the engine that they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ...errors import ConfigError

if TYPE_CHECKING:
    from ...jobs import Engine

__all__ = [
    "AddressOption",
    "CpusOption",
    "EngineOption",
    "GpusOption",
    "WorkersOption",
    "open_engine",
    "refuse_without_ray",
]

# typer reads annotations at run time, on Python 3.10 too: hence Optional instead of "| None".
EngineOption = Annotated[
    str, typer.Option("--engine", help="local (this process) or ray (needs the extra 'ray').")
]
AddressOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--address",
        help="With --engine ray: a running cluster, HOST:PORT or auto; default: this machine.",
    ),
]
WorkersOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--workers", min=1, help="With --engine ray: so many workers; default: all that fit."
    ),
]
GpusOption = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--gpus-per-worker",
        min=0,
        help="With --engine ray: 0.5 lets two workers share a GPU; default: 1 where there are any.",
    ),
]
CpusOption = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--cpus-per-worker",
        min=0,
        help="With --engine ray: cores, and so threads, of a worker (default: 1).",
    ),
]


@contextmanager
def open_engine(
    engine: str,
    address: str | None,
    workers: int | None,
    gpus_per_worker: float | None,
    cpus_per_worker: float | None,
) -> Iterator[Engine]:
    """The engine that the flags ask for, connected while the context is open.

    Raises ConfigError for an unknown one and for flags that it has no use for, EngineError when it
    can't be reached.
    """
    refuse_without_ray(
        engine,
        {
            "address": address,
            "workers": workers,
            "gpus-per-worker": gpus_per_worker,
            "cpus-per-worker": cpus_per_worker,
        },
    )
    if engine == "ray":
        from ..ray import RayEngine, connected

        with connected(address):
            yield RayEngine(workers, gpus_per_worker, cpus_per_worker)
        return
    from ...jobs import LocalEngine

    yield LocalEngine()


def refuse_without_ray(engine: str, flags: Mapping[str, object]) -> None:
    """Raise ConfigError for an unknown engine, and for one of these flags where it isn't Ray."""
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine is {engine!r}, but must be local or ray.")
    for flag, value in flags.items():
        if engine == "local" and value is not None:
            raise ConfigError(f"--{flag} is for --engine ray, which was not given.")
