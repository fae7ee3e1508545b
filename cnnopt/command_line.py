"""The parser of every command. A mistake raises UserError, and ``main`` turns it into one line and status 2.

Standard library only, and for any Python from 3.8, like ``cnnopt.launch``.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnopt import __version__, interrupt
from cnnopt.distributed.signals import INTERRUPTED
from cnnopt.errors import CnnoptError, UserError

if TYPE_CHECKING:
    #: The function of a command: the command line to the exit status.
    Main = Callable[..., int]


def one_line(name: str, speaks: Callable[[], bool] = lambda: True) -> Callable[[Main], Main]:
    """Make the ``main`` of command ``name`` answer an expected failure with one line and its exit status.

    The status after Ctrl-C is 130. ``speaks``: whether this process prints the line, as only one rank should.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def answered(*arguments: Any) -> int:
            try:
                interrupt.raise_error()
                status = main(*arguments)
                # Here an error of standard output still becomes one line.
                print(end="", flush=True)
                return status
            except KeyboardInterrupt:
                # The second Ctrl-C of an impatient user.
                interrupt.end_at_once()
                return INTERRUPTED
            except CnnoptError as error:
                # Silence is usual where the reader has gone, as with ``| head``.
                if speaks() and not isinstance(error.__cause__, BrokenPipeError):
                    print(f"{name}: {error}", file=sys.stderr)
                return error.exit_status

        return answered

    return decorate


def python_m(module: str) -> list[str]:
    """The command ``python -m module``, for use when only this program knows the folder of cnnopt.

    PYTHONPATH cannot name a folder with a colon, and with PYTHONSAFEPATH Python searches no other folder of ours.
    """
    # argv[0] is as Python sets it for -m (cnnopt/__init__.py).
    code = f"import runpy, sys; sys.path.insert(0, {str(Path(__file__).parents[1].resolve())!r}); sys.argv[0] = '-m'; "
    return [sys.executable, "-c", f"{code}runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"]


class Paragraphs(argparse.RawDescriptionHelpFormatter):
    """Wraps the paragraphs of a description to the terminal, and keeps lines that are indented, such as commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled: list[str] = []
        for kept, group in itertools.groupby(text.strip().splitlines(), lambda line: line[:1] in ("", " ")):
            lines = list(group)
            filled += lines if kept else textwrap.wrap(" ".join(lines).replace("``", ""), width)
        return "\n".join(filled)


class Parser(argparse.ArgumentParser):
    """An argument parser with ``--version`` and without abbreviations, whose errors are UserErrors.

    ``stray`` is the remedy in the message about unrecognized arguments.
    """

    def __init__(self, *, stray: str = "see --help", **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Paragraphs, **kwargs)
        self.stray = stray
        self.add_argument("--version", action="version", version=f"cnnopt {__version__}", help="print the version")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but the error for an unknown flag suggests the nearest known one."""
        given, strange = self.parse_known_args(args, namespace)
        if strange:
            near = nearest(strange[0].split("=")[0], self._option_string_actions)
            raise UserError(f"unrecognized argument {strange[0]}: {near or self.stray}")
        for name, value in vars(given).items():
            if isinstance(value, Path):
                setattr(given, name, at_home(value))
            elif isinstance(value, list):
                setattr(given, name, [at_home(entry) if isinstance(entry, Path) else entry for entry in value])
        return given

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As in argparse, but the error for an unknown choice suggests the nearest known one."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = nearest(str(value), action.choices or ())
            raise argparse.ArgumentError(action, f"{error.message}: {near}" if near else error.message) from None

    def error(self, message: str) -> Any:
        """Raise UserError with one line; argparse would print several."""
        raise UserError(message if message.endswith("?") else f"{message}; see --help")


def at_home(path: Path) -> Path:
    """``path`` with ~ expanded, which a shell does not do in --flag=~/path. Raises UserError."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no such home folder; give a path without ~") from None


def nearest(given: str, known: Iterable[str]) -> str:
    """A question that suggests the intended name. Empty if no known name is near.

    It suggests the name with similar spelling, or else all names that contain the words of ``given``. For --lr these
    are --lr-drops and --base-lr, among others.
    """
    known = list(known)
    near = difflib.get_close_matches(given, known, 1, 0.75)
    if not near:
        words = set(given.strip("-").split("-"))
        near = [name for name in known if words <= set(name.strip("-").split("-"))]
    return f"did you mean {' or '.join(near)}?" if near else ""
