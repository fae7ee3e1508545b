"""Packages that are optional or replace one another, and the line that names a missing one. Standard library only."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from cnnopt.errors import UserError

#: The packages that contain TensorFlow Lite's interpreter, by --runtime. The first loads ten times as fast.
RUNTIMES = {"litert": "ai-edge-litert", "tf": "tensorflow"}


class MissingError(UserError):
    """A package that is not installed. The message is one line that names the flag, the package and the remedy."""


def installed(package: str) -> bool:
    """Whether ``package`` can be imported. It is not imported."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def require(flag: str, packages: Iterable[str]) -> None:
    """Raise MissingError, which names ``flag``, unless all ``packages`` are installed."""
    missing = [package for package in packages if not installed(package)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingError(
            f"{flag}: {' and '.join(missing)} {verb} not installed; run EXTRAS=1 make env (Python 3.11 or newer), or "
            f"uv pip install {' '.join(missing)}"
        )


def choose_runtime(asked: str | None) -> str:
    """The key of ``RUNTIMES`` that is asked for, or else of an installed package. Raises MissingError."""
    found = asked or next((name for name, package in RUNTIMES.items() if installed(package)), "litert")
    require(f"--runtime {found}", [RUNTIMES[found]])
    return found
