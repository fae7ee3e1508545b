"""Locks of folders. The other process is a real one."""

import fcntl
import subprocess
import sys
import time

from cnnopt.run import locks
from tests.helpers import ROOT

OTHER = """
import sys
from pathlib import Path
from cnnopt.run import locks
held = locks.hold(Path(sys.argv[1]))
print(held is not None, flush=True)
input()
"""


def test_another_process_is_kept_out_until_the_lock_is_released_or_its_holder_ends(tmp_path):
    file = tmp_path / "lock"
    command = [sys.executable, "-c", OTHER, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "True\n"
            before = time.monotonic()
            assert locks.hold(file) is None
            assert locks.hold(file, patience=0.2) is None
            assert time.monotonic() - before >= 0.2
        finally:
            other.kill()
    mine = locks.hold(file)
    assert mine.is_locked
    refused = subprocess.run(command, cwd=ROOT, input="\n", capture_output=True, text=True)
    assert refused.stdout == "False\n"
    mine.release()
    assert subprocess.run(command, cwd=ROOT, input="\n", capture_output=True, text=True).stdout == "True\n"


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    assert locks.hold(tmp_path / "lock") is not None
