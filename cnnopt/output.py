"""Standard output and standard error that nobody can take: a run goes on, and a command that only answers fails.

Standard library only, and for any Python from 3.8, like ``cnnopt.launch``.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

from cnnopt.errors import RunError


class OutputError(RunError):
    """Standard output cannot be written."""


class _File(io.FileIO):
    """A file descriptor that accepts everything, even if the disk is full or the other end of the pipe has gone."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            # The result is None if a pipe that does not block is full.
            return super().write(data) or len(data)
        return len(data)


class _Answer(_File):
    """A file descriptor whose first failure raises OutputError. Later writes are dropped: Python's end makes one."""

    failed = False

    def write(self, data: Any) -> int:
        if self.failed:
            return len(data)
        try:
            return io.FileIO.write(self, data) or len(data)
        except OSError as error:
            self.failed = True
            raise OutputError(f"standard output: {error.strerror}; free some space, or send it elsewhere") from error


def outlive_readers() -> None:
    """From now on, output of this process that nobody can take is dropped and raises nothing."""
    _take_over(_File)


def need_readers() -> None:
    """From now on, standard output that nobody can take raises OutputError. Standard error is dropped."""
    _take_over(_Answer)


def _take_over(output: type[_File]) -> None:
    """Replace both streams. Standard output becomes a text stream on ``output``.

    A stream that was closed before the program started becomes /dev/null. Otherwise the next file to be opened would
    get its number, and C++ code would write its messages for standard error into that file.
    """
    columns = os.environ.get("COLUMNS", "")
    # rich prints nothing with COLUMNS=0, which some programs leave behind. Without it, rich asks the terminal.
    if columns.isdigit() and int(columns) < 40:
        del os.environ["COLUMNS"]
    for number, name, kind in ((1, "stdout", output), (2, "stderr", _File)):
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
            # A log shows a line once it is printed.
            settings = {"encoding": given.encoding, "errors": given.errors, "line_buffering": True}
        buffer = io.BufferedWriter(kind(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, **settings))
