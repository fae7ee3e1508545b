"""SIGTERM, SIGUSR1 and Ctrl-C: during training they ask for a save and a stop, at other times they end the process.

Once one rank has failed, srun itself sends SIGTERM to all ranks, and reports the highest exit status. So under srun, a
rank that SIGTERM ends before or after training exits with 1, and the job gets the status of the failed rank. With 75,
wrong input would be hidden, and a job that can only fail again would be requeued. The batch scripts ask for a stop
with SIGUSR1.

Ctrl-C comes from a person. The exit status is then 130, which no batch script requeues. The second one ends at once.

Standard library only, so that signals are heard before TensorFlow is loaded.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

from cnnopt.errors import RunError, ThreadLimitError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED = os.EX_TEMPFAIL
INTERRUPTED = 128 + signal.SIGINT


class StopRequest:
    """Whether this process was told to stop.

    A thread hears the signals. A Python handler would wait for the main thread, which is in C++ most of the time:
    for seconds while a step is compiled, for minutes in an exchange with a rank that hangs.
    """

    #: Seconds in which one request of a scheduler may arrive twice: directly, and through the launcher.
    ONE_REQUEST = 10.0
    #: Seconds in which one Ctrl-C may arrive twice: from the terminal, and through the launcher.
    ONE_PRESS = 1.0

    def __init__(self) -> None:
        self.told = False
        #: The exit status of this process after it was told to stop and has saved.
        self.status = STOPPED
        self.training = False

    def listen(self) -> None:
        """Take over the signals. Call from the main thread. Raises ThreadLimitError if no thread can be started."""
        reader, writer = socket.socketpair()
        hearing = threading.Thread(target=self._hear, args=(reader, writer), name="signals", daemon=True)
        try:
            hearing.start()
        except RuntimeError as error:
            raise ThreadLimitError(f"{error}: check ulimit -u, and the process limit of the container") from None
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            # A shell starts its background commands with Ctrl-C ignored. Leave it ignored.
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

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
                    # Finished work is saved, and the same command starts the rest again.
                    by_srun = number == signal.SIGTERM and "SLURM_STEP_ID" in os.environ
                    os._exit(RunError.exit_status if by_srun else self.status)
            elif time.monotonic() - told_at > (self.ONE_PRESS if number == signal.SIGINT else self.ONE_REQUEST):
                # After training all is saved. Keep the status: a launcher (or srun) ends ranks that outlive the first.
                os._exit(128 + number if self.training else self.status)
