"""The parser of every command: a mistake is one UserError, and ``main`` makes one line and status 2 of it.

Standard library only, and of any Python from 3.7, as ``cnnopt.launch`` is.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cnnopt.errors import UserError


def python_m(module: str) -> list[str]:
    """``python -m module``, where only this program knows in which folder cnnopt is.

    PYTHONPATH can name no folder with a colon, and with PYTHONSAFEPATH Python looks in no other of ours.
    """
    code = f"import runpy, sys; sys.path.insert(0, {str(Path(__file__).parents[1].resolve())!r}); "
    return [sys.executable, "-c", f"{code}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are UserErrors.

    ``stray`` is what to say of arguments that are none of its own.
    """

    def __init__(self, *, stray: str = "see --help", **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self.stray = stray

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; a flag that does not exist is answered with the nearest that does."""
        given, strange = self.parse_known_args(args, namespace)
        if strange:
            near = nearest(strange[0].split("=")[0], self._option_string_actions)
            raise UserError(f"unrecognized argument {strange[0]}: {near or self.stray}")
        return given

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As in argparse; a choice that does not exist is answered with the nearest that does."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = nearest(str(value), action.choices or ())
            raise argparse.ArgumentError(action, f"{error.message}: {near}" if near else error.message) from None

    def error(self, message: str) -> Any:
        """Raise what argparse would print in several lines."""
        raise UserError(message if message.endswith("?") else f"{message}; see --help")


def nearest(given: str, known: Iterable[str]) -> str:
    """A question that names what was meant; empty where nothing is near.

    What is spelt alike, or else all that have the words of ``given`` among theirs: --lr, --lr-drops and --base-lr.
    """
    known = list(known)
    near = difflib.get_close_matches(given, known, 1, 0.75)
    if not near:
        words = set(given.strip("-").split("-"))
        near = [name for name in known if words <= set(name.strip("-").split("-"))]
    return f"did you mean {' or '.join(near)}?" if near else ""
