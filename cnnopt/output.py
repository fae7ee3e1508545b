"""Standard output and error that outlive their readers: a run goes on when nobody can read what it prints.

Standard library only, and of any Python from 3.7, as ``cnnopt.launch`` is.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any


class _File(io.FileIO):
    """A file descriptor that takes everything, also where the disk is full or the other end of the pipe has gone."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            # None, where a pipe that does not block is full.
            return super().write(data) or len(data)
        return len(data)


def outlive_readers() -> None:
    """From here on, what this process prints and nobody can take is lost, and raises nothing.

    A stream that was closed by whoever started the program is /dev/null: else the next file that is opened would have
    its number, and hold what C++ code says to standard error.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        given = getattr(sys, name)
        settings: dict[str, Any] = {}
        if given is None:
            # Opened as the lowest free number, which may be this one.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.set_inheritable(number, True)
            if nowhere > number:
                os.close(nowhere)
        else:
            with contextlib.suppress(OSError):
                given.flush()
            # Python writes through where it is started with -u.
            by_lines = given.line_buffering or given.write_through
            settings = {"encoding": given.encoding, "errors": given.errors, "line_buffering": by_lines}
        buffer = io.BufferedWriter(_File(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, **settings))
