"""Run a child process, pass the signals of this process on to it, and take it along at the end. Standard library only.

Linux sends a child a signal at the death of its parent, if the child has asked for it (prctl(2), PR_SET_PDEATHSIG). So
a child stops and saves even if its parent is killed and cannot pass anything on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

#: Signals passed on to the child. They are blocked and wait, so none is lost while the child starts.
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
#: ``si_code`` of a signal that the kernel itself sent, such as a terminal's Ctrl-C (asm-generic/siginfo.h).
SI_KERNEL = 0x80
#: The number of this option in linux/prctl.h.
PR_SET_PDEATHSIG = 1


def run(command: Sequence[str]) -> int:
    """Run ``command`` in this environment. Returns its exit status, or 128 plus the number of the fatal signal.

    The child gets SIGTERM if the thread that calls this ends first.
    """
    sys.stdout.flush()
    heard = {*PASSED_ON, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    try:
        ask = end_with_parent()
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork beside other threads, such as NumPy's. This child only turns into another.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _become(command, before, ask)
        while True:
            told = signal.sigwaitinfo(heard)
            if told.si_signo == signal.SIGCHLD:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    return code if code >= 0 else 128 - code
            # The kernel sends a terminal's Ctrl-C to the child too, so it is not passed on.
            elif told.si_code != SI_KERNEL:
                os.kill(child, told.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> Callable[[], bool]:
    """A function for a child to call right after its fork. From then on it gets SIGTERM when this thread ends.

    It returns False if its parent has died already. The library is loaded here, because a child must not load one.
    """
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def ask() -> bool:
        prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
        return os.getppid() == parent

    return ask


def _become(command: Sequence[str], mask: Iterable[int], ask: Callable[[], bool]) -> NoReturn:
    """Turn this child into ``command``. It must not return into the code of its parent."""
    try:
        if ask():
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execv(command[0], list(command))
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)
