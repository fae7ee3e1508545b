"""Signals before, during and after training, while the main thread does not come back to Python."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers import ROOT

# A thread that locks a mutex twice waits in C for ever, as one does in an exchange with a rank that hangs.
STUCK = """
import ctypes
from cnnopt.distributed.signals import StopRequest
request = StopRequest()
request.listen()
request.training, request.ONE_REQUEST = {training}, 1.0
if {saved}:
    # Told while it trained, and by now all is saved.
    import os, signal, time
    os.kill(os.getpid(), signal.SIGUSR1)
    while not request.told:
        time.sleep(0.01)
    request.training = False
    time.sleep(1.5)
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
print("ready", flush=True)
libc.pthread_mutex_lock(mutex)
"""


@contextlib.contextmanager
def stuck(
    *, training: bool, saved: bool = False, before: Sequence[str] = (), **variables: str
) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(
        [*before, sys.executable, "-c", STUCK.format(training=training, saved=saved)],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_before_training_a_signal_ends_the_process(number, status):
    with stuck(training=False) as process:
        process.send_signal(number)
        assert process.wait(30) == status


def test_the_second_ctrl_c_ends_it_at_once():
    with stuck(training=True) as process:
        process.send_signal(signal.SIGINT)
        # As a launcher passes on what the terminal has sent to all.
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_ctrl_c_is_not_heard_where_a_shell_has_it_ignored():
    ignored = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    with stuck(training=False, before=ignored) as process:
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 75)])
def test_a_rank_that_srun_ends_early_hides_no_other_ranks_status(number, status):
    with stuck(training=False, SLURM_STEP_ID="0") as process:
        process.send_signal(number)
        assert process.wait(30) == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_during_training_a_later_second_signal_ends_it_at_once(number):
    with stuck(training=True) as process:
        process.send_signal(number)
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("variables", [{}, {"SLURM_STEP_ID": "0"}])
def test_a_rank_that_has_stopped_and_saved_says_so_however_it_is_ended(variables):
    # srun ends the ranks that are still leaving once the first has left, and reports the highest status of all.
    with stuck(training=True, saved=True, **variables) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75


def test_a_child_takes_the_signals_as_any_program_does():
    code = "from cnnopt.distributed.signals import StopRequest; import os\n"
    code += "StopRequest().listen(); os.execvp('sleep', ['sleep', '60'])"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            assert process.poll() is None
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
