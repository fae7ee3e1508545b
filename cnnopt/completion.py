"""Completion of all commands in bash and zsh: shtab's script for each parser, and a part that finds the command.

A command starts with ``python``, ``horovodrun`` or another program. So the words to complete are those after the last
``train_hvd.py`` or ``-m cnnopt.NAME`` on the line.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping

import shtab

#: The programs before a command. ``train_hvd.py`` can also be started directly.
STARTERS = "train_hvd.py python python3 horovodrun srun"

BASH = """
_cnnopt() {
  local i command="" at=0
  for ((i = 0; i < COMP_CWORD; i++)); do
    case ${COMP_WORDS[i]} in
      train_hvd.py | */train_hvd.py) command=train_hvd.py at=$i ;;
      cnnopt.*) [[ ${COMP_WORDS[i - 1]} != -m ]] || command=${COMP_WORDS[i]} at=$i ;;
    esac
  done
  COMPREPLY=()
  if [[ -n $command ]]; then
    COMP_WORDS=(cnnopt "$command" "${COMP_WORDS[@]:at + 1}")
    COMP_CWORD=$((COMP_CWORD - at + 1))
    _shtab_cnnopt
  elif [[ ${COMP_WORDS[COMP_CWORD - 1]} == -m ]]; then
    COMPREPLY=($(compgen -W "MODULES" -- "${COMP_WORDS[COMP_CWORD]}"))
  fi
}
complete -o bashdefault -o default -F _cnnopt STARTERS
"""

ZSH = """
_cnnopt() {
  local i command="" at=0
  for ((i = 1; i < CURRENT; i++)); do
    case ${words[i]} in
      train_hvd.py | */train_hvd.py) command=train_hvd.py at=$i ;;
      cnnopt.*) [[ ${words[i-1]} != -m ]] || { command=${words[i]} at=$i } ;;
    esac
  done
  if [[ -n $command ]]; then
    words=(cnnopt "$command" "${(@)words[at + 1, -1]}")
    (( CURRENT -= at - 2 ))
    _shtab_cnnopt
  elif [[ ${words[CURRENT-1]} == -m && ${words[CURRENT]} == cn* ]]; then
    compadd -- MODULES
  elif [[ $service == python* ]]; then
    _python
  else
    _default
  fi
}
compdef _cnnopt STARTERS
"""


def script(shell: str, commands: Mapping[str, str]) -> str:
    """The text to ``eval`` in ``shell``, "bash" or "zsh". ``commands``: each as typed, with one line about it."""
    root = argparse.ArgumentParser(prog="cnnopt")
    subparsers = root.add_subparsers()
    names = {command.split()[-1]: about for command, about in commands.items()}
    for name, about in names.items():
        subparsers.add_parser(name, parents=[_parser(name)], add_help=False, help=about)
    own = {"bash": BASH, "zsh": ZSH}[shell]
    modules = " ".join(name for name in names if name.startswith("cnnopt."))
    return shtab.complete(root, shell) + own.replace("MODULES", modules).replace("STARTERS", STARTERS)


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser of a command, in which the arguments that are paths are marked as such for shtab."""
    homes = {"train_hvd.py": "cnnopt.config", "cnnopt.quantize": "cnnopt.export.options"}
    parser = importlib.import_module(homes.get(command, command)).parser()
    for action in parser._actions:
        if action.metavar in ("DIR", "RUN"):
            action.complete = shtab.DIRECTORY
        elif action.metavar in ("IMAGE", "PROGRAM", "COMMAND"):
            action.complete = shtab.FILE
    return parser
