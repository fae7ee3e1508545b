"""Files that are there whole or not at all. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from cnnopt.errors import RunError


class WriteError(RunError):
    """A file that cannot be written: one line that names it."""


def replace(path: Path, content: str | bytes) -> None:
    """Write ``path`` whole; it keeps what it held until all of ``content`` is on the disk. Raises WriteError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror}); free some space or check the folder") from None
