"""Locks that keep a second process out of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import FileLock


def hold(file: Path, *, patience: float = 0) -> FileLock | None:
    """Lock ``file`` until the result is released or forgotten. None if another process holds it for ``patience`` s.

    Some file systems have no locks. There, users must take care themselves.
    """
    import filelock  # here, because it takes a tenth of a second, and wrong input must be answered sooner

    lock = filelock.FileLock(file, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except filelock.Timeout:
        return None
    except OSError:
        pass
    return lock
