"""The job scripts as text: the flags that they pass on, and shellcheck. tests/cluster runs them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cnnopt.config import parse_args
from tests.helpers import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here: sudo apt-get install shellcheck")
def test_shellcheck_finds_nothing():
    files = [str(path.relative_to(ROOT)) for path in [*SCRIPTS, *(ROOT / "slurm").glob("*.sh"), ROOT / ".ci/run"]]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


#: A scontrol that ends the script as SLURM does once a job is queued again.
REQUEUES = '[ "$1" = requeue ] || exit 0; echo "requeued $2"; kill -KILL "$SCRIPT"'


def job(folder: Path, commands: dict[str, str], command: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run ``command`` of slurm/common.sh in a job whose SLURM commands are played by ``commands``, texts for sh.

    ``settings``: variables of the job, in capitals, and arguments of ``subprocess.run``.
    """
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    script = f"set -euo pipefail; export SCRIPT=$$; TRAINS=1; . slurm/common.sh; {command}"
    variables = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "test", "SLURM_NTASKS": "2",
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        **{name: value for name, value in settings.items() if name.isupper()},
    }  # fmt: skip
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams |= {name: value for name, value in settings.items() if not name.isupper()}
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env={**os.environ, **variables}, text=True, timeout=60, **streams
    )


@pytest.mark.parametrize("launcher", ["srun", "horovodrun"])
def test_a_signal_before_the_ranks_start_puts_the_job_back_into_the_queue(launcher, tmp_path):
    # SLURM's commands are played; tests/cluster/test_slurm.py has real ones, but not the second that this needs.
    commands = {
        "scontrol": f'[ "$1" != requeue ] && kill -USR1 "$SCRIPT" || {{ {REQUEUES}; }}',
        "squeue": "echo RUNNING",
        "srun": 'echo "$@" >>"$STARTED"',
    }
    started = tmp_path / "started"
    done = job(tmp_path, commands, "train --dataset synthetic", LAUNCHER=launcher, STARTED=str(started))
    assert "told to stop: saving" in done.stdout, done.stderr
    assert "requeued 7" in done.stdout, done.stderr
    # No rank: only the version and, for horovodrun, the names of the hosts were asked for.
    asked = started.read_text().split()
    assert asked == ["--version", *(["hostname"] if launcher == "horovodrun" else [])]


def test_a_signal_in_the_set_up_puts_the_job_back_into_the_queue(tmp_path):
    setup, started = tmp_path / "site.sh", tmp_path / "started"
    setup.write_text('kill -USR1 "$SCRIPT"\n')
    commands = {"scontrol": REQUEUES, "squeue": "echo RUNNING", "srun": 'echo "$@" >>"$STARTED"'}
    done = job(tmp_path, commands, "train --dataset synthetic", CNNOPT_SETUP=str(setup), STARTED=str(started))
    assert "requeued 7" in done.stdout, done.stderr
    assert started.read_text() == "--version\n"


@pytest.mark.parametrize(
    ("told", "answers"), [(True, "exit 138"), (True, "printf '1\n--depth\n8\n'"), (False, "exit 2")]
)
def test_a_signal_while_the_cell_is_looked_up_puts_the_task_back_into_the_queue(told, answers, tmp_path):
    # The step that asks cnnopt.study for the cell.
    commands = {
        "scontrol": REQUEUES, "squeue": "echo RUNNING",
        "srun": f'case "$*" in *cnnopt.study*) {"kill -USR1 $SCRIPT;" if told else ""} {answers};; esac',
    }  # fmt: skip
    sweep = ". slurm/sweep.sbatch"
    done = job(tmp_path, commands, sweep, SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT))
    assert ("requeued 7_3" in done.stdout) == told, done
    assert done.returncode == (-9 if told else 2)


def test_a_python_that_does_not_look_into_its_folder_finds_cnnopt_all_the_same(tmp_path):
    done = job(tmp_path, {}, "python -m cnnopt.launch -np 1 -- echo found", PYTHONSAFEPATH="1")
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr


@pytest.mark.parametrize(
    ("status", "queued"), [(75, True), (137, True), (130, False), (143, False), (1, False), (2, False)]
)
def test_what_a_run_ended_with_decides_whether_it_is_queued_again(status, queued, tmp_path):
    done = job(tmp_path, {"squeue": "echo RUNNING", "scontrol": REQUEUES}, f"requeue_or_exit {status}")
    assert ("requeued 7" in done.stdout) == queued, done
    assert done.returncode == (-9 if queued else status)


@pytest.mark.parametrize("answer", ["", "exit 1"])
def test_a_busy_controller_is_asked_again_without_the_filters_of_the_user(answer, tmp_path):
    asked = f'[ -z "$SQUEUE_STATES" ] || exit 0; [ ! -e {tmp_path}/asked ] || exec echo RUNNING; >{tmp_path}/asked'
    commands = {"squeue": f"{asked}; {answer}", "scontrol": REQUEUES}
    done = job(tmp_path, commands, "requeue_or_exit 75", SQUEUE_STATES="PENDING")
    assert "requeued 7" in done.stdout, done


def test_a_full_disk_keeps_no_job_from_the_queue(tmp_path):
    queued = tmp_path / "queued"
    commands = {"squeue": "echo RUNNING", "scontrol": f'touch {queued}; kill -KILL "$SCRIPT"'}
    with open("/dev/full", "w") as full:
        job(tmp_path, commands, "requeue_or_exit 75", stdout=full, stderr=full)
    assert queued.exists()


@pytest.mark.parametrize("name", ["CNNOPT_INTERFACE", "CNNOPT_PORT"])
def test_a_network_is_not_ignored_by_other_launchers(name):
    variables = {"SLURM_JOB_NAME": "test", "LAUNCHER": "pmix", name: "ib0"}
    done = subprocess.run(
        ["bash", "-c", ". slurm/common.sh"], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "test: CNNOPT_INTERFACE and CNNOPT_PORT are for LAUNCHER=srun, not pmix\n"


def sourced(setup: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {"SLURM_JOB_NAME": "test", "SLURM_JOB_ID": "7", "CNNOPT_SETUP": str(setup)}
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; . slurm/common.sh; {command}", "script", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_a_set_up_is_not_run_in_strict_mode_and_the_script_goes_on_in_it(tmp_path):
    setup = tmp_path / "site.sh"
    # The last line as `module list 2>&1 | grep -q cuda`, which ends before all is written.
    setup.write_text("false\nexport SITE=$NOT_SET:here\nPATH=/elsewhere:$PATH\nseq 100000 | head -n 1 >/dev/null\n")
    done = sourced(setup, 'echo "$SITE ${inside[*]} ${PATH%%:*} $SHELLOPTS"')
    assert (done.returncode, done.stderr) == (0, "")
    site, inside, first, options = done.stdout.split()
    assert (site, inside, first) == (":here", "slurm/set_up.sh", f"{ROOT}/.venv/bin")
    assert {"errexit", "nounset", "pipefail"} <= set(options.split(":"))


def test_a_set_up_neither_sees_nor_changes_the_arguments(tmp_path):
    setup = tmp_path / "site.sh"
    # As `source activate` of conda, which takes all arguments for its own.
    setup.write_text("[ $# = 0 ] || exit 9\necho loaded\nset -- others\n")
    done = sourced(setup, 'echo "$@"; "${inside[@]}" echo of the rank', "--dataset", "two words")
    assert (done.returncode, done.stdout) == (0, "loaded\n--dataset two words\nof the rank\n"), done
    # What it prints before a rank does not mix with the answer of a command.
    assert done.stderr == "loaded\n"


@pytest.mark.parametrize(
    ("text", "command"),
    # The second as on a node that lacks what the first node has.
    [("false\n", "true"), ('[ -z "$FAIL" ]\n', 'FAIL=1 "${inside[@]}" true')],
    ids=["in the job script", "before a rank"],
)
def test_a_set_up_that_fails_ends_the_job_with_one_line(text, command, tmp_path):
    setup = tmp_path / "site.sh"
    setup.write_text(text)
    done = sourced(setup, command)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"CNNOPT_SETUP={setup}: its last command failed with status 1" in line


@pytest.mark.parametrize("name", ["slurm/super.sbatch", "slurm/quantize.sbatch", "docs/slurm.md"])
def test_the_commands_it_shows_parse(name):
    text = (ROOT / name).read_text().replace("\\\n#", " ").replace("\\\n", " ")
    commands = re.findall(r"slurm/super\.sbatch +(--[^)\n#`]*)", text)
    assert commands
    for flags in commands:
        parse_args(["--preset", "super", *shlex.split(flags)])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_folder_of_the_log_is_in_the_repository(path):
    (output,) = re.findall(r"^#SBATCH --output=(\S+)/", path.read_text(), re.M)
    assert (ROOT / output).is_dir()
