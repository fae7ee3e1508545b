"""Let a run go on when nobody can read its standard output or standard error any more.

Standard library only, and for any Python from 3.7, like ``cnnopt.launch``.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any


class _File(io.FileIO):
    """A file descriptor that accepts everything, even if the disk is full or the other end of the pipe has gone."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            # The result is None if a pipe that does not block is full.
            return super().write(data) or len(data)
        return len(data)


def outlive_readers() -> None:
    """From now on, output of this process that nobody can take is dropped and raises nothing.

    A stream that was closed before the program started becomes /dev/null. Otherwise the next file to be opened would
    get its number, and C++ code would write its messages for standard error into that file.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        given = getattr(sys, name)
        settings: dict[str, Any] = {}
        if given is None:
            # os.open takes the lowest free number, which may be ``number`` already.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.set_inheritable(number, True)
            if nowhere > number:
                os.close(nowhere)
        else:
            with contextlib.suppress(OSError):
                given.flush()
            # Python writes through if it was started with -u.
            by_lines = given.line_buffering or given.write_through
            settings = {"encoding": given.encoding, "errors": given.errors, "line_buffering": by_lines}
        buffer = io.BufferedWriter(_File(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, **settings))
