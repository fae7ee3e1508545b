"""The parser of every command: a mistake is one UserError, and ``main`` makes one line and status 2 of it.

Standard library only, and of any Python from 3.7, as ``cnnopt.launch`` is.
"""

from __future__ import annotations

import argparse
import difflib
from typing import Any

from cnnopt.errors import UserError


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
            near = difflib.get_close_matches(strange[0].split("=")[0], self._option_string_actions, 1, 0.8)
            raise UserError(f"unrecognized argument {strange[0]}: {f'did you mean {near[0]}?' if near else self.stray}")
        return given

    def error(self, message: str) -> Any:
        """Raise what argparse would print in several lines."""
        raise UserError(f"{message}; see --help")
