"""Start the ranks of a run without ssh or MPI, and serve the rendezvous through which they find each other.

    on one machine    python -m cnnopt.launch -np 2 -- python train_hvd.py ...
    in a SLURM job    python -m cnnopt.launch -- srun python train_hvd.py ...

In a SLURM job srun starts the ranks, and train_hvd.py takes rank and size from SLURM_*. The exit status is that of
srun, or of the first rank that failed. After Ctrl-C the status is 130: the ranks save at the first Ctrl-C, and end at
the second. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from cnnopt.command_line import Parser, one_line
from cnnopt.distributed.rendezvous import Rendezvous, address_of, check_own_name
from cnnopt.distributed.signals import INTERRUPTED, STOPPED
from cnnopt.errors import UserError
from cnnopt.output import outlive_readers

#: Seconds that ranks have to end by themselves after one has failed, and as many again after SIGTERM.
GRACE = 10.0
#: Seconds that a rank waits for another. Gloo's 30 are too few: on a cold file system some ranks start minutes later.
GLOO_TIMEOUT = "120"


def rank_variables(rank: int, size: int) -> dict[str, str]:
    """Horovod's variables for rank ``rank`` of ``size`` ranks on this host."""
    place = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size, "CROSS_RANK": 0, "CROSS_SIZE": 1}
    return {f"HOROVOD_{name}": str(value) for name, value in place.items()}


def supervise(commands: dict[str, tuple[list[str], dict[str, str]]]) -> int:
    """Run named commands in their environments, pass signals on to them, and end all when one fails.

    Returns 0, or the status of the first that failed. If a signal ended it, that is 128 plus its number, as in a shell.
    """
    children: dict[str, subprocess.Popen] = {}
    pressed = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed += number == signal.SIGINT
        # A terminal sends Ctrl-C to the children too, which count both signals as one. srun passes SIGUSR1 on to its
        # tasks, and ends them at SIGTERM. A rank that was told to stop before ends at SIGINT.
        again = number == signal.SIGINT and pressed > 1
        for child in children.values():
            for each in (signal.SIGINT, signal.SIGTERM) if again else (signal.SIGUSR1,):
                if child.poll() is None:
                    child.send_signal(each)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        # A shell starts its background commands with Ctrl-C ignored. Leave it ignored.
        if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    for name, (command, environment) in commands.items():
        children[name] = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    failed_at, status = None, 0
    running = dict(children)
    while running:
        for name in [name for name, child in running.items() if child.poll() is not None]:
            code = running.pop(name).returncode
            if code and failed_at is None:
                failed_at, status = time.monotonic(), code if code > 0 else 128 - code
                how = f"ended with status {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
                print(f"cnnopt.launch: {name} {how}", file=sys.stderr, flush=True)
        late = 0.0 if failed_at is None else time.monotonic() - failed_at
        for child in running.values():
            if late > 2 * GRACE:
                child.kill()
            elif late > GRACE:
                child.terminate()
        time.sleep(0.1)
    # After Ctrl-C, a rank that has saved exits with 75. The signal killed a rank that could not hear it yet.
    return INTERRUPTED if pressed and (status == STOPPED or status > 128) else status


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="python -m cnnopt.launch", description=__doc__, stray="the command goes after --")
    made.add_argument("-np", type=int, metavar="N", help="ranks to start here; without it the command is an srun")
    made.add_argument("--interface", metavar="IF", help="network of the rendezvous [that of this host's name]")
    made.add_argument("--port", type=int, default=0, metavar="N", help="port of the rendezvous [any free one]")
    made.add_argument(
        "command",
        nargs="+",
        metavar="COMMAND",
        help="after --: srun python train_hvd.py ..., or python train_hvd.py ...",
    )
    return made


@one_line("cnnopt.launch")
def main(argv: list[str] | None = None) -> int:
    """Parse the command line, serve, start, wait."""
    return launch(parser().parse_args(argv))


def launch(options: argparse.Namespace) -> int:
    """Serve the rendezvous while the command runs. Returns the command's exit status."""
    if options.np is None and "SLURM_JOB_ID" not in os.environ:
        raise UserError("-np is missing: outside a SLURM job, say how many ranks to start")
    if options.np is not None and options.np < 1:
        raise UserError(f"-np {options.np}: must be at least 1")
    if not 0 <= options.port < 65536:
        raise UserError(f"--port {options.port}: must be below 65536")
    address = "127.0.0.1" if options.np and not options.interface else address_of(options.interface)
    if options.np is None and os.environ.get("SLURM_JOB_NUM_NODES", "1") not in ("", "1"):
        check_own_name(address)
    with Rendezvous(address, options.port) as server:
        shared = {"HOROVOD_GLOO_TIMEOUT_SECONDS": GLOO_TIMEOUT, **os.environ, **server.variables()}
        if options.interface:
            shared["NCCL_SOCKET_IFNAME"] = options.interface
        if options.np is None:
            commands = {options.command[0]: (options.command, shared)}
        else:
            commands = {
                f"rank {rank}": (options.command, {**shared, **rank_variables(rank, options.np)})
                for rank in range(options.np)
            }
        try:
            return supervise(commands)
        except OSError as error:
            raise UserError(f"{options.command[0]}: cannot be started: {error.strerror}") from None
        finally:
            server.shutdown()


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
