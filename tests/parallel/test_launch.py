"""train_hvd.py under horovodrun: a whole run, wrong input, and ranks that are told to stop or killed."""

import json
import os
import platform
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from cnnopt.config import parse_args
from cnnopt.run import checkpoint
from cnnopt.run.run_folder import RunFolder
from tests.helpers.cifar_copies import BINARY_10, small_copy
from tests.helpers.jobs import assert_pruned

pytestmark = pytest.mark.timeout(900)
TINY = ["--dataset", "synthetic", "--depth", "8", "--batch-size", "16", "--precision", "bfloat16"]


OWN = (sys.executable, "-m", "cnnopt.launch", "-np", "{ranks}", "--")


def train(start, run_dir: Path, *flags: str, ranks: int = 2, **launcher: tuple[str, ...]):
    return start(ranks, "train_hvd.py", *TINY, "--run-dir", str(run_dir), "--name", "run", *flags, **launcher)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "run/metrics.jsonl").read_text().splitlines()]


def ended(processes: list[psutil.Process], within: float) -> bool:
    """True if all processes are gone, or are zombies that nobody has waited for, within some seconds."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory) -> tuple[Path, int, str]:
    """A run of 12 epochs on 2 ranks whose rank 1 got SIGTERM in the middle."""
    run_dir = tmp_path_factory.mktemp("stopped")
    job = train(start, run_dir, "--epochs", "12", "--save-every", "3e")
    job.wait_for("epoch   4/12")
    job.ranks()[1].send_signal(signal.SIGTERM)
    status = job.wait()
    return run_dir, status, job.output()


def test_a_signal_to_one_rank_stops_all_after_a_save(stopped):
    run_dir, status, output = stopped
    # horovodrun itself answers any failure with 1; rank 0 says what it ended with.
    assert status != 0
    assert "exit with status code 75" in output
    assert "stopped by a signal, and saved" in output
    saved = checkpoint.list_steps(run_dir / "run/checkpoints")
    assert checkpoint.load(saved[-1]).step > 4 * 32
    assert not (run_dir / "run/result.json").exists()


def test_the_same_command_goes_on_at_another_rank_count_and_draws_one_curve(stopped, start):
    run_dir, _, _ = stopped
    done = checkpoint.load(checkpoint.list_steps(run_dir / "run/checkpoints")[-1]).step
    job = train(start, run_dir, "--epochs", "12", "--save-every", "3e", "--expect-ranks", "1", ranks=1)
    assert job.wait() == 0, job.output()
    assert f"resumed after step {done}" in job.output()
    lines = metrics(run_dir)
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines] == [32 * epoch for epoch in range(1, 13)]
    result = json.loads((run_dir / "run/result.json").read_text())
    assert result["test_accuracy"] == lines[-1]["test_accuracy"] > 0.5
    final = checkpoint.load(checkpoint.list_steps(run_dir / "run/checkpoints")[-1])
    assert_pruned(final.arrays, 0.6)


def test_ctrl_c_saves_and_ends_all_ranks(start, tmp_path):
    job = train(start, tmp_path, "--epochs", "100")
    job.wait_for("epoch   1/100")
    ranks = job.ranks()
    assert len(ranks) == 2
    # A terminal sends it to the whole foreground process group.
    os.killpg(job.process.pid, signal.SIGINT)
    # Its status is 1, or now and then 0 (docs/reliability.md, "Exit status").
    job.wait(60)
    assert ended(ranks, within=30)
    assert not (tmp_path / "run/result.json").exists()
    assert checkpoint.list_steps(tmp_path / "run/checkpoints")
    assert "Traceback" not in "".join(line for line in job.output().splitlines(True) if "<stderr>" in line)


def test_ctrl_c_to_our_own_launcher_saves_and_is_130(start, tmp_path):
    job = train(start, tmp_path, "--epochs", "100", launcher=OWN)
    job.wait_for("epoch   1/100")
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.wait(120) == 130, job.output()
    assert job.output().count("stopped by a signal, and saved; the same command goes on") == 1
    assert "Traceback" not in job.output()
    assert checkpoint.list_steps(tmp_path / "run/checkpoints")


def test_all_ranks_take_the_word_of_the_first_whether_a_run_is_complete(start, tmp_path):
    # As where hosts share no disk: each rank has a folder of its own.
    config = parse_args([*TINY, "--run-dir", str(tmp_path / "0"), "--name", "run"])
    complete = RunFolder.of(config)
    complete.path.mkdir(parents=True)
    complete.config_file.write_text(json.dumps({"identity": config.identity()}))
    complete.append({"step": 1})
    complete.finish({"step": 1, "line": "as it was"})
    code = "import os, runpy, sys; sys.argv[1:1] = ['--run-dir', sys.argv.pop(1) + '/' + os.environ['HOROVOD_RANK']]; "
    code += "sys.path.insert(0, '.'); sys.argv[0] = 'train_hvd.py'; runpy.run_path('train_hvd.py', run_name='__main__')"
    job = start(2, "-c", code, str(tmp_path), *TINY, "--name", "run", launcher=OWN)
    assert job.wait(200) == 0, job.output()
    assert job.output() == f"{complete.path} is complete: as it was\n"
    assert not (tmp_path / "1").exists()


def test_ranks_with_other_images_are_refused(start, tmp_path):
    for rank, images in enumerate((16, 12)):
        small_copy(BINARY_10, images).folder(tmp_path / f"{rank}")
    code = "import os, runpy, sys; sys.argv += ['--data-dir', sys.argv.pop(1) + '/' + os.environ['HOROVOD_RANK']]; "
    code += "sys.path.insert(0, '.'); sys.argv[0] = 'train_hvd.py'; runpy.run_path('train_hvd.py', run_name='__main__')"
    flags = [*TINY, "--dataset", "cifar10", "--run-dir", str(tmp_path), "--name", "run"]
    job = start(2, "-c", code, str(tmp_path), *flags, launcher=OWN)
    assert job.wait(200) == 2, job.output()
    here = platform.node()
    found = (
        rf"80 training and 16 test images, digest \w{{8}} on {here}, 60 training and 12 .*, digest \w{{8}} on {here}"
    )
    line = rf"--data-dir: {found}; give all hosts the same copy of the data set\n"
    assert re.search(line, job.output()), job.output()
    assert not (tmp_path / "run").exists()


def test_a_killed_rank_ends_the_job_and_is_named(start, tmp_path):
    job = train(start, tmp_path, "--epochs", "100")
    job.wait_for("epoch   1/100")
    ranks = job.ranks()
    ranks[1].kill()
    assert job.wait(120) != 0
    assert ended(ranks, within=30)
    assert f"pid {ranks[1].pid}): killed, stopped, or cut off from the network" in job.output()
    assert "train_hvd.py: rank 1 (host localhost, " in job.output()


def test_a_stop_that_cannot_save_says_so_and_not_that_it_saved(start, tmp_path):
    job = train(start, tmp_path, "--epochs", "100", "--save-every", "50e")
    job.wait_for("epoch   1/100")
    # Where the folder of checkpoints belongs.
    (tmp_path / "run/checkpoints").write_text("")
    job.ranks()[1].send_signal(signal.SIGTERM)
    assert job.wait(120) != 0
    output = job.output()
    assert output.count("train_hvd.py: cannot save") == 1
    assert "exit with status code 75" not in output
    assert "stopped by a signal" not in output
    assert "terminate called" not in output


def hears(process: psutil.Process, number: int) -> bool:
    """True once the process has a handler for a signal, from the mask in /proc/PID/status."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_signal_before_the_first_step_ends_all_ranks_at_once(start, tmp_path):
    job = train(start, tmp_path, "--epochs", "100")
    deadline = time.monotonic() + 120
    while len(ranks := job.ranks()) < 2 or not all(hears(rank, signal.SIGUSR1) for rank in ranks):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.1)
    ranks[1].send_signal(signal.SIGUSR1)
    assert job.wait(60) != 0
    assert ended(ranks, within=30)
    assert "Process 1 exit with status code 75" in job.output()
    assert "Traceback" not in "".join(line for line in job.output().splitlines(True) if "<stderr>" in line)
    assert not (tmp_path / "run/checkpoints").exists()


def test_our_own_launcher_hands_a_signal_on_and_the_status_back(start, tmp_path):
    job = train(start, tmp_path, "--epochs", "100", launcher=OWN)
    job.wait_for("epoch   1/100")
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(120) == 75, job.output()
    assert "stopped by a signal, and saved" in job.output()


@pytest.mark.parametrize(
    ("ranks", "flags", "message"),
    [
        (3, [], "--batch-size 16: cannot be split evenly over 3 ranks; use 15 or 18"),
        (2, ["--expect-ranks", "4"], "--expect-ranks 4: 2 started; check -np, --ntasks or the worker replicas"),
    ],
)
def test_wrong_input_is_one_line_of_one_rank(start, tmp_path, ranks, flags, message):
    job = train(start, tmp_path, *flags, ranks=ranks)
    assert job.wait(120) != 0
    said = [line for line in job.output().splitlines() if "<stderr>" in line or "<stdout>" in line]
    # The shells in which horovodrun starts ranks announce that they end the others.
    said = [line for line in said if not line.endswith(">:Terminated")]
    assert said == [f"[0]<stderr>:train_hvd.py: {message}"]
    assert "exit with status code 2" in job.output()
    assert list(tmp_path.iterdir()) == []
