"""Files that are there whole or not at all, and what they hold. Standard library only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cnnopt.errors import RunError, UserError


class ReadError(UserError):
    """A file that cannot be used: one line that names it and the remedy."""


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ReadError, with ``remedy``."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ReadError(f"{path}: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ReadError(f"{path} is damaged: {remedy}")
    return content


class WriteError(RunError):
    """A file that cannot be written: one line that names it."""


def replace(path: Path, content: str | bytes) -> None:
    """Write ``path`` whole; it keeps what it held until all of ``content`` is on the disk. Raises WriteError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with temporary.open("wb") as file:
                # The name of a folder may hold bytes that are no text in this locale.
                file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror}); free some space or check the folder") from None
