"""Run a program from command line to exit status: hear signals, print an expected failure once and on one line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import cache_from_source
from typing import NoReturn

from cnnopt.command_line import python_m
from cnnopt.distributed import collectives, host
from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.signals import INTERRUPTED, StopRequest
from cnnopt.distributed.world import LaunchError, World, launched
from cnnopt.errors import CnnoptError, RunError
from cnnopt.output import outlive_readers


def run(name: str, body: Callable[[StopRequest, PeerStatus], int]) -> int:
    """Run ``body`` on this rank. Returns the exit status. An error line begins with ``name``."""
    request, peers = StopRequest(), PeerStatus(name)
    try:
        world, _ = launched()
    except LaunchError:
        # ``body`` reports this error itself, unless it only prints help or refuses a flag.
        world = World()
    try:
        host.check_limits()
        request.listen()
        return body(request, peers)
    except KeyboardInterrupt:
        return INTERRUPTED
    # Speak inside the except block. Its end frees the error and all that its frames hold, which takes seconds.
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
    """Run ``main`` as the whole program and end with its status. It runs on if nobody reads its output."""
    outlive_readers()
    leave(main())


def become(module: str, *arguments: str) -> NoReturn:
    """Continue as ``python -m module`` in this process, so that a signal meant for one ends the other."""
    _remove_generated_files()
    sys.stdout.flush()
    os.execv(sys.executable, [*python_m(module), *arguments])


def leave(status: int) -> NoReturn:
    """Write out all output and end this process at once.

    A normal exit takes TensorFlow apart, for seconds on a busy machine. A launcher that has seen one rank end kills
    the others meanwhile, and their status would be the signal's.
    """
    _remove_generated_files()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _remove_generated_files() -> None:
    """Remove the temporary files of AutoGraph, one for each function that it has rewritten. Only a normal exit does."""
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file") and module.__file__:
            compiled = cache_from_source(module.__file__)
            for file in (module.__file__, compiled):
                with contextlib.suppress(OSError):
                    os.unlink(file)
            with contextlib.suppress(OSError):
                # Fails if another program's files are there too.
                os.rmdir(os.path.dirname(compiled))


def _speak(peers: PeerStatus, world: World, why: str, status: int, *, of_one_rank: bool) -> None:
    # Once one rank has ended, the launcher ends all others. Ignore its SIGTERM, as this rank may have to print.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if peers.places:
        peers.speak(world.rank, why)
    else:
        # The exchange failed before the ranks knew each other's addresses.
        why = why or "another rank has ended while the ranks were starting: see its message"
        if not (world.first or of_one_rank):
            # All ranks may have this error. Then rank 0 prints it and ends, and the launcher ends this rank.
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, lambda *_: leave(status))
            time.sleep(3)
            if world.local_rank:
                return
            # Nobody ended this rank, so only this host has the error.
            why = f"rank {world.rank} (host {collectives.hostname()}): {why}"
        print(f"{peers.program}: {why}", file=sys.stderr, flush=True)
    if "SLURM_STEP_ID" in os.environ:
        # Once this task ends, srun kills tasks that are still starting. It then closes its connections without reading
        # on (client_io_handler_abort in Slurm's step_launch.c). So give srun time to read the line first.
        time.sleep(1)
