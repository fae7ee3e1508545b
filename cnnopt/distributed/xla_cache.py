"""The folder in which XLA keeps what it has compiled, so that the next process need not compile it again.

Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """``cnnopt/xla`` below the user's cache folder: $XDG_CACHE_HOME, else ~/.cache."""
    # A path that is not absolute is to be ignored (XDG Base Directory Specification).
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "cnnopt/xla"


def variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variable that gives XLA the folder. Empty if nothing can be written there: XLA would end the run."""
    try:
        place = folder(environ)
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        # Path.home raises RuntimeError for a user without a home folder.
        return {}
    # TensorFlow splits the flags at white space.
    usable = os.access(place, os.W_OK | os.X_OK) and len(str(place).split()) == 1
    return {"TF_XLA_FLAGS": f"--tf_xla_persistent_cache_directory={place}"} if usable else {}
