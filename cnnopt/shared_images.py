"""One copy of the decoded images for all ranks of a host: files that every rank maps into its memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
Splits = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]


def shared(place: Path, read: Callable[[], Splits]) -> Splits:
    """What ``read`` gives of ``place``, a file or folder: decoded by the first process that asks, mapped by the others.

    The arrays, which are read-only, are in the temporary folder of this host, for this user alone. A ``place`` that
    has changed is decoded anew. Where nothing can be written, each process has a copy of its own. Raises what ``read``
    raises.
    """
    import filelock

    try:
        mine = _private_folder()
        folder = mine / _fingerprint(place)
        with filelock.FileLock(mine / f"{folder.name}.lock"):
            if not folder.exists():
                splits = read()
                partial = Path(tempfile.mkdtemp(dir=mine))
                try:
                    for name, array in zip(ARRAYS, splits[:4], strict=True):
                        np.save(partial / f"{name}.npy", array)
                    (partial / "class_names.json").write_text(json.dumps(splits[4]))
                    os.rename(partial, folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
        return (*arrays, tuple(json.loads((folder / "class_names.json").read_text())))
    # A full or read-only disk, or files that something has cut short: a copy is always possible.
    except (OSError, ValueError):
        return read()


def _private_folder() -> Path:
    """Raises OSError where it is another user's, who could give us any images."""
    folder = Path(tempfile.gettempdir()) / f"cnnopt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _fingerprint(place: Path) -> str:
    """Of a file, or of all files of a folder: where they are, how large, and when they were written."""
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]
