"""From the command line to the exit status: signals are heard, and each expected failure is one line of one rank."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from cnnopt.command_line import python_m
from cnnopt.distributed import collectives
from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.signals import INTERRUPTED, StopRequest
from cnnopt.distributed.world import LaunchError, World, launched
from cnnopt.errors import CnnoptError, RunError
from cnnopt.output import outlive_readers


def run(name: str, body: Callable[[StopRequest, PeerStatus], int]) -> int:
    """Run ``body`` on this rank; returns the exit status. ``name`` begins the line of an error."""
    request, peers = StopRequest(), PeerStatus(name)
    request.listen()
    try:
        world, _ = launched()
    except LaunchError:
        # The program says it, where it is not asked for help or given a wrong flag.
        world = World()
    try:
        return body(request, peers)
    except KeyboardInterrupt:
        return INTERRUPTED
    # Each speaks before the error is let go of, and all that its frames hold with it, which takes seconds.
    except CnnoptError as error:
        _speak(peers, world, str(error), error.exit_status, of_one_rank=error.of_one_rank)
        return error.exit_status
    except Exception as error:
        why = ""
        if world.size == 1 or not collectives.is_exchange_failure(error):
            traceback.print_exc()
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if world.size > 1:
            _speak(peers, world, why, RunError.exit_status, of_one_rank=bool(why))
        return RunError.exit_status


def start(main: Callable[[], int]) -> NoReturn:
    """Be the program ``main``: run it, whoever reads what it prints, and end with its status."""
    outlive_readers()
    leave(main())


def become(module: str, *arguments: str) -> NoReturn:
    """Go on as ``python -m module``, in this process, so that a signal which ends the one ends the other."""
    sys.stdout.flush()
    os.execv(sys.executable, [*python_m(module), *arguments])


def leave(status: int) -> NoReturn:
    """End this process at once, all that it wrote with it.

    TensorFlow is taken apart for seconds on a busy machine, in which a launcher that has seen one rank end kills the
    others: their status would be the signal's.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _speak(peers: PeerStatus, world: World, why: str, status: int, *, of_one_rank: bool) -> None:
    # A launcher ends all ranks once one has ended, and the one that has to speak may not be the first to end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if peers.places:
        peers.speak(world.rank, why)
    else:
        # The exchange has failed before the ranks knew where each other answers.
        why = why or "another rank has ended while the ranks were starting: see its message"
        if not (world.first or of_one_rank):
            # All ranks may share the error: then the first says it and ends, for which the launcher ends this one.
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, lambda *_: leave(status))
            time.sleep(3)
            if world.local_rank:
                return
            # They do not: it is this host's.
            why = f"rank {world.rank} (host {collectives.hostname()}): {why}"
        print(f"{peers.program}: {why}", file=sys.stderr, flush=True)
    if "SLURM_STEP_ID" in os.environ:
        # Once a task was killed, as one that still starts is because this one ends, srun closes its connections
        # without reading on (client_io_handler_abort in Slurm's step_launch.c): the line has to be there by then.
        time.sleep(1)
