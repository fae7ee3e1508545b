"""The folder in which XLA keeps what it has compiled, so that the next process need not compile it again.

Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from cnnopt.distributed import host

#: Bytes that must be free, many times those of a run's compiled functions.
ROOM = 64 * 2**20


def folder(environ: Mapping[str, str] = os.environ, gpus: Path = Path("/proc/driver/nvidia/gpus")) -> Path:
    """``cnnopt/xla`` below the user's cache folder ($XDG_CACHE_HOME, else ~/.cache), and in it a folder for this
    version of TensorFlow, the processors of this host, and $XLA_FLAGS.

    XLA names an entry by the function alone. It would run code that was compiled for something else.
    """
    # A path that is not absolute is to be ignored (XDG Base Directory Specification).
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    models = {line for file in gpus.glob("*/information") for line in _lines(file) if line.startswith("Model:")}
    kind = repr((sorted(models), host.cpu(), sorted(host.cpu_flags()), environ.get("XLA_FLAGS", "")))
    version = host.versions(["tensorflow"])["tensorflow"] or "tensorflow"
    named = f"{version}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    return (base if base.is_absolute() else Path.home() / ".cache") / "cnnopt/xla" / named


def _lines(file: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return file.read_text(errors="replace").splitlines()
    return []


def variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variable that gives XLA the folder. Empty if there is no ``ROOM`` in it: XLA would end the run."""
    try:
        place = folder(environ)
        place.mkdir(parents=True, exist_ok=True)
        probe = place / f".probe-{os.getpid()}"
        try:
            with probe.open("wb") as file:
                # A full disk, a quota or a limit of file sizes fails here.
                os.posix_fallocate(file.fileno(), 0, ROOM)
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, RuntimeError):
        # Path.home raises RuntimeError for a user without a home folder.
        return {}
    # TensorFlow splits the flags at white space.
    usable = len(str(place).split()) == 1
    return {"TF_XLA_FLAGS": f"--tf_xla_persistent_cache_directory={place}"} if usable else {}
