"""A child process hears the signals of the one that waits for it, and its exit status is handed on."""

import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PARENT = "import sys; from cnnopt.distributed import child; sys.exit(child.run([sys.executable, '-c', sys.argv[1]]))"


def start(program: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PARENT, program], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("program", "status"), [("", 0), ("raise SystemExit(75)", 75), ("raise SystemExit(130)", 130)])
def test_the_exit_status_is_that_of_the_child(program, status):
    with start(program) as parent:
        assert parent.wait(60) == status


def test_a_child_that_a_signal_ends_has_the_status_of_a_shell():
    with start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") as parent:
        assert parent.wait(60) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_parent_waits(number):
    program = (
        "import os, signal, sys, time\n"
        # No print: the handler may run inside the one below.
        f"signal.signal({int(number)}, lambda *_: (os.write(1, b'heard\\n'), sys.exit(75)))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    with start(program) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(number)
        assert parent.stdout.readline() == "heard\n"
        assert parent.wait(60) == 75


def test_a_child_is_told_to_stop_when_its_parent_is_killed():
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'heard\\n'), sys.exit(75)))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    with start(program) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.readline() == "heard\n"
        # The child held it last.
        assert parent.stdout.read() == ""


def test_a_child_that_cannot_be_started_has_the_status_of_a_shell():
    code = "import sys; from cnnopt.distributed import child; sys.exit(child.run(['/no/such/program']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (127, "/no/such/program: No such file or directory\n")


def test_a_signal_is_not_lost_while_the_child_starts():
    # It arrives before there is a child: blocked by then, or the parent would end by it.
    program = (
        "import os, signal, sys; from cnnopt.distributed import child\n"
        "fork = os.fork\n"
        "def late(): os.kill(os.getpid(), signal.SIGTERM); return fork()\n"
        "os.fork = late\n"
        "sys.exit(child.run([sys.executable, '-c', 'import time; time.sleep(60)']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM


def test_ctrl_c_reaches_the_child_once():
    program = (
        "import signal, time\n"
        "count = [0]\n"
        "def heard(*_): count[0] += 1\n"
        "signal.signal(signal.SIGINT, heard)\n"
        "print('ready', flush=True)\n"
        "end = time.monotonic() + 1\n"
        "while time.monotonic() < end: time.sleep(0.1)\n"
        "raise SystemExit(count[0])"
    )
    # A terminal of its own, whose Ctrl-C goes to parent and child.
    code = (
        "import os, pty, sys\n"
        "pid, terminal = pty.fork()\n"
        f"if not pid: os.execv(sys.executable, [sys.executable, '-c', {PARENT!r}, {program!r}])\n"
        "while b'ready' not in os.read(terminal, 100): pass\n"
        "os.write(terminal, bytes([3]))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 1
