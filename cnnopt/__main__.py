"""List the commands of cnnopt, or print what completes them in a shell.

python -m cnnopt
source <(python -m cnnopt --print-completion bash)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cnnopt.command_line import Parser, one_line
from cnnopt.output import need_readers

#: Each command, with one line about it, in the order of their use.
COMMANDS = {
    "python train_hvd.py": "train a pruned, mixed-precision ResNet",
    "python -m cnnopt.launch": "start the ranks of a run, without ssh or MPI",
    "python -m cnnopt.launch_plan": "print how to start one run with each launcher",
    "python -m cnnopt.elastic": "train on hosts that come and go",
    "python -m cnnopt.quantize": "export a finished run, and measure its files",
    "python -m cnnopt.finetune": "fine-tune a finished run for int8",
    "python -m cnnopt.predict": "classify images with an exported network",
    "python -m cnnopt.compare": "compare several runs",
    "python -m cnnopt.study": "run a grid, and make its tables and figures",
}


def parser() -> Parser:
    """The parser of this command."""
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:<{width}}{about}" for name, about in COMMANDS.items())
    made = Parser(
        prog="python -m cnnopt",
        description="Train a pruned, mixed-precision CIFAR ResNet, and measure what that gains.",
        epilog=f"commands, each with --help:\n{listing}",
    )
    made.add_argument("--print-completion", choices=("bash", "zsh"), help="print the completion of all commands")
    return made


@one_line("cnnopt")
def main(argv: Sequence[str] | None = None) -> int:
    """Print the list, or the completion. Returns the exit status."""
    made = parser()
    given = made.parse_args(argv)
    if given.print_completion:
        from cnnopt import completion

        print(completion.script(given.print_completion, COMMANDS))
    else:
        made.print_help()
    return 0


if __name__ == "__main__":
    need_readers()
    sys.exit(main())
