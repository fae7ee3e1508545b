"""SIGTERM, SIGUSR1 and Ctrl-C: in training they ask for a save and a stop, before and after it they end the process.

srun sends SIGTERM itself, to all ranks once one has failed, and reports the highest status of them all. So under srun
a rank that SIGTERM ends before or after training says 1, and the job's status is that of the rank that failed: 75 would
hide wrong input, and put a job into the queue that can only fail again. The batch scripts ask for a stop by SIGUSR1.

Ctrl-C is a person's: what it ends says 130, which no batch script queues again, and the second ends at once.

Standard library only, so that they are heard before TensorFlow is loaded.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from cnnopt.errors import RunError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED = os.EX_TEMPFAIL
INTERRUPTED = 128 + signal.SIGINT


class StopRequest:
    """Whether this process was told to stop.

    A thread hears the signals. A handler in Python would wait for the main thread, which is in C++ most of the
    time: for seconds while a step is compiled, for minutes in an exchange with a rank that hangs.
    """

    #: Seconds in which a scheduler's one request may come again: to the rank, and through its launcher.
    ONE_REQUEST = 10.0
    #: And in which one Ctrl-C may: from the terminal, and through the launcher.
    ONE_PRESS = 1.0

    def __init__(self) -> None:
        self.told = False
        #: With which this process ends once it was told and has saved.
        self.status = STOPPED
        self.training = False

    def listen(self) -> None:
        """Take over the signals; from the main thread."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            # A shell has its background commands ignore Ctrl-C.
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._hear, args=(reader, writer), name="signals", daemon=True).start()

    def _hear(self, reader: socket.socket, writer: socket.socket) -> None:
        told_at = 0.0
        while True:
            number = reader.recv(1)[0]
            if number not in SIGNALS:
                continue
            if number == signal.SIGINT:
                self.status = INTERRUPTED
            if not self.told:
                self.told, told_at = True, time.monotonic()
                if not self.training:
                    # What is done is saved, and what is not saved is begun anew by the same command.
                    by_srun = number == signal.SIGTERM and "SLURM_STEP_ID" in os.environ
                    os._exit(RunError.exit_status if by_srun else self.status)
            elif time.monotonic() - told_at > (self.ONE_PRESS if number == signal.SIGINT else self.ONE_REQUEST):
                # After training all is saved: srun, or another launcher, ends the ranks that end after the first.
                os._exit(128 + number if self.training else self.status)
