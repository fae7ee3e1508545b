"""Ctrl-C while a program imports its modules: it ends at once, without a traceback. Standard library only.

Python raises KeyboardInterrupt. In the middle of an import that prints a traceback, and C++ code may turn it into
another error.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


def end_at_once() -> None:
    """From now on, Ctrl-C ends this process.

    A shell starts its background commands with Ctrl-C ignored. It stays ignored.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_error() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt, so that files are closed and a terminal gets its cursor back."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Ctrl-C inside ends this process at once. For the import of a large library in the middle of a program."""
    before = signal.getsignal(signal.SIGINT)
    end_at_once()
    try:
        yield
    finally:
        if before == signal.default_int_handler:
            raise_error()
