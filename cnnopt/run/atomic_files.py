"""Write files whole or not at all, and read JSON files. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cnnopt.errors import CnnoptError, RunError, UserError


class ReadError(UserError):
    """A file cannot be used. The message is one line that names the file and the remedy."""


def read_text(path: Path) -> str:
    """What a file holds, with a mark for each byte that is no text; nothing for a pipe, whose other end may never come.

    Raises OSError.
    """
    with open(path, errors="replace", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ReadError, with ``remedy``."""
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise ReadError(f"{path}: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ReadError(f"{path} is damaged: {remedy}")
    return content


class WriteError(RunError):
    """A file cannot be written. The message is one line that names the file."""


@contextlib.contextmanager
def replace_together(folder: Path) -> Iterator[Path]:
    """A new folder in ``folder``. At the end, what is in it replaces what has the same name in ``folder``.

    After an error nothing is replaced, and the message of a CnnoptError names the files as if they were in ``folder``.
    For one process at a time. Raises WriteError.
    """
    new = folder / ".new"
    shutil.rmtree(new, ignore_errors=True)
    try:
        with _writing(new):
            new.mkdir()
        try:
            yield new
        except CnnoptError as error:
            error.args = (str(error).replace(str(new), str(folder)),)
            raise
        for path in sorted(new.iterdir()):
            target = folder / path.name
            with _writing(target):
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(path, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def replace(path: Path, content: str | bytes) -> None:
    """Write ``path`` whole. Its old content stays until all of ``content`` is on the disk. Raises WriteError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path):
        try:
            with temporary.open("wb") as file:
                # ``content`` may name a folder with bytes that are no text in this locale.
                file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror}); free some space or check the folder") from None
