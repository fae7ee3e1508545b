"""Run a child process and pass the signals of this process on to it. Standard library only."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

#: Signals passed on to the child. They are blocked and wait, so none is lost while the child starts.
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
#: ``si_code`` of a signal that the kernel itself sent, such as a terminal's Ctrl-C (asm-generic/siginfo.h).
SI_KERNEL = 0x80


def run(command: Sequence[str]) -> int:
    """Run ``command`` in this environment. Returns its exit status, or 128 plus the number of the fatal signal."""
    sys.stdout.flush()
    heard = {*PASSED_ON, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    try:
        child = os.posix_spawn(command[0], list(command), os.environ, setsigmask=before)
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
