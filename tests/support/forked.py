"""Actions in a process of their own, forked from this one, which has loaded what they need."""

import multiprocessing
import os
import signal

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork and SIGKILL")


def forked(action):
    """The exit status of a process that does `action`, negative for the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=action, daemon=True)
    process.start()
    process.join()
    return process.exitcode


def kill_self():
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
