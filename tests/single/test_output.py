"""Programs whose output nobody can take: they go on, and end with the status of what they do."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cnnopt.command_line import python_m
from tests.helpers import ROOT

PROGRAM = """
import contextlib, os, sys
from pathlib import Path
from rich.console import Console
from cnnopt.output import outlive_readers
outlive_readers()
for line in range(3):
    print("a line", line, flush=True)
    Console().print("and one of rich")
    print("a warning", file=sys.stderr)
Path(sys.argv[1]).write_text("done")
with contextlib.suppress(OSError):
    os.write(2, b"from C++")
# As much as no buffer holds, and a last line that waits in one.
print("x" * 100_000)
"""


def run(done: Path, **streams: object) -> int:
    return subprocess.run([sys.executable, "-c", PROGRAM, str(done)], cwd=ROOT, timeout=60, **streams).returncode


def test_a_full_disk_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        assert run(tmp_path / "done", stdout=full, stderr=full) == 0
    assert (tmp_path / "done").read_text() == "done"


def test_a_reader_that_has_gone_ends_nothing(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    assert run(tmp_path / "done", stdout=writer, stderr=writer) == 0
    os.close(writer)
    assert (tmp_path / "done").read_text() == "done"


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", PROGRAM, str(tmp_path / "done")]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0
    assert (tmp_path / "done").read_text() == "done"


def test_what_can_be_read_is_whole(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "done")]
    done = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True)
    lines = [word for line in range(3) for word in (f"a line {line}", "and one of rich")]
    assert done.stdout.splitlines() == [*lines, "x" * 100_000]
    assert done.stderr == "a warning\n" * 3 + "from C++"


def test_a_pipe_gets_a_line_once_it_is_printed():
    code = "from cnnopt.output import outlive_readers; outlive_readers(); print('now'); input()"
    command = [sys.executable, "-c", code]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=buffered, text=True, **pipes) as process:
        assert process.stdout.readline() == "now\n"
        with contextlib.suppress(BrokenPipeError):
            process.communicate("\n", timeout=30)


@pytest.mark.parametrize("module", ["cnnopt.launch", "cnnopt.elastic"])
def test_a_line_of_an_error_that_nobody_can_read_changes_no_status(module):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", module, "--wrong"], cwd=ROOT, stdout=full, stderr=full, timeout=60)
    assert done.returncode == 2


@pytest.mark.parametrize("command", ["cnnopt.launch_plan", "cnnopt.compare tests/single/runs/resnet20-np2-4epochs"])
def test_an_answer_that_nobody_can_take_is_an_error_of_one_line(command):
    given = [sys.executable, "-m", *command.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(given, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    line = f"{command.split()[0]}: standard output: No space left on device; free some space, or send it elsewhere\n"
    assert (done.returncode, done.stderr) == (1, line)
    # As with ``| head``, nobody is there to read the line.
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(given, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


COMMANDS = ["", ".launch", ".launch_plan", ".elastic", ".finetune", ".quantize", ".compare", ".predict", ".study"]


@pytest.mark.parametrize("command", [*(["-m", f"cnnopt{name}"] for name in COMMANDS), python_m("cnnopt.finetune")[1:],
                                     [str(ROOT / "train_hvd.py")]], ids=lambda command: command[-1][-20:])  # fmt: skip
def test_ctrl_c_while_a_program_imports_ends_it_without_a_traceback(command, tmp_path):
    # A module that all of them import.
    (tmp_path / "difflib.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *command, "--help"], cwd=ROOT, env=environment, text=True, **pipes)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (-signal.SIGINT, "")


def test_a_program_of_ours_is_found_below_a_folder_with_a_colon(tmp_path):
    copy = tmp_path / "a:b"
    copy.mkdir()
    (copy / "cnnopt").symlink_to(ROOT / "cnnopt")
    code = f"import sys; sys.path.insert(0, {str(copy)!r}); from cnnopt import command_line as c; "
    code += "print(*c.python_m('cnnopt.launch'), sep=chr(10))"
    variables = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    given = command.stdout.strip().split("\n", 2)
    done = subprocess.run([*given, "--help"], env=variables, capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m cnnopt.launch")
