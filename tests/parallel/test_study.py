"""cnnopt.study on real runs: four cells of a ResNet-8, interrupted, killed, with one that fails, and their tables."""

import csv
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from cnnopt.grid import records
from cnnopt.run.run_folder import RunFolder

pytestmark = pytest.mark.timeout(900)
ONLY = ("baseline", "polynomial-60", "super-60", "super-70")
FLAGS = ["--scale", "0.02", "--np", "2", "--dataset", "digits", "--depth", "8", "--seed", "0"]
NAME = "original-digits-resnet8-{}-6epochs-seed0"


@pytest.fixture(scope="module")
def study(start, tmp_path_factory):
    """Starts the study of the four cells, in one folder."""
    run_dir = tmp_path_factory.mktemp("study")

    def begin(*flags: str):
        return start(1, "-m", "cnnopt.study", *FLAGS, "--run-dir", str(run_dir), *flags, launcher=())

    return run_dir, begin


def begun(folder: Path) -> bool:
    return (folder / "config.json").exists()


def wait_for(condition, job) -> None:
    job.wait_until(lambda _: condition())


@pytest.fixture(scope="module")
def ended(study):
    """The folder of the study after an interruption, a kill, a failure and the rest, and what it said at each end."""
    run_dir, begin = study
    first, second, third, other = (run_dir / NAME.format(label) for label in ("polynomial-60", "super-60", "baseline",
                                                                            "super-70"))  # fmt: skip
    said = {}
    # A run of other settings, which the study must leave alone.
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"identity": {"dataset": "cifar10"}, "name": other.name}))

    job = begin("--variants", "none", "--only", *ONLY)
    wait_for(lambda: begun(first), job)
    job.process.send_signal(signal.SIGINT)
    said["interrupted"] = job.wait(), job.output()

    job = begin("--variants", "none", "--only", *ONLY)
    wait_for(lambda: begun(second), job)
    left = [child for child in psutil.Process(job.process.pid).children(recursive=True) if child.is_running()]
    job.process.kill()
    job.wait()
    end = time.monotonic() + 60
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in left):
        assert time.monotonic() < end, "ranks outlive the study"
        time.sleep(0.2)
    said["trained"] = (first / "result.json").stat().st_mtime_ns

    job = begin("--variants", "none", "--only", *ONLY)
    said["failed"] = job.wait(), job.output()

    (other / "config.json").unlink()
    job = begin("--variants", "float32,int8", "--only", "super-70")
    said["last"] = job.wait(), job.output()
    assert begun(third)
    return run_dir, said


def test_after_ctrl_c_a_kill_and_a_failure_the_same_command_goes_on(ended):
    run_dir, said = ended
    status, output = said["interrupted"]
    assert status == 130, output
    assert "stopped; the same command goes on from here" in output
    status, output = said["failed"]
    assert status == 1, output
    assert "3 of 4 cells are done" in output
    (failure,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert "super-70" in failure
    assert "holds a run of another configuration" in failure
    assert said["last"][0] == 0, said["last"][1]
    assert "1 of 1 cells are done" in said["last"][1]
    # The cell that was complete before the kill was not trained again.
    assert (run_dir / NAME.format("polynomial-60") / "result.json").stat().st_mtime_ns == said["trained"]


def test_each_cell_is_a_run_on_its_ranks(ended):
    run_dir, _ = ended
    for label, ranks, sparsity in (("baseline", 1, 0), ("polynomial-60", 1, 0.6), ("super-60", 2, 0.6),
                                   ("super-70", 2, 0.7)):  # fmt: skip
        folder = RunFolder(run_dir / NAME.format(label))
        assert json.loads((folder.path / "env.json").read_text())["ranks"] == ranks
        result = folder.result()
        assert result["epoch"] == 6
        assert result["sparsity"] == pytest.approx(sparsity, abs=1e-3)
        assert [line["epoch"] for line in folder.metrics()] == [1, 2, 3, 4, 5, 6]


def test_the_tables_hold_what_the_run_folders_hold(ended):
    run_dir, _ = ended
    report = run_dir / "report"
    accuracy = {
        label: json.loads((run_dir / NAME.format(label) / "result.json").read_text())["accuracy"] for label in ONLY
    }
    found = {row["cell"]: row for row in csv.DictReader((report / "accuracy.csv").open())}
    assert set(found) == set(ONLY)
    for label in ONLY:
        assert float(found[label]["ours %"]) == pytest.approx(100 * accuracy[label])
        ratio = accuracy[label] / accuracy["polynomial-60"]
        assert label == "polynomial-60" or float(found[label]["ours / our polynomial-60"]) == pytest.approx(ratio)
    card = json.loads((run_dir / NAME.format("super-70") / "report.json").read_text())
    gzip = {entry["name"]: entry["size"]["gzip"] for entry in card["files"]}
    files = {row["file"]: row for row in csv.DictReader((report / "sizes.csv").open())}
    assert {name: float(row["our bytes"]) for name, row in files.items()} == gzip
    assert float(files["int8"]["our ratio"]) == pytest.approx(gzip["float32"] / gzip["int8"])
    (answer,) = csv.DictReader((report / "questions.csv").open())
    assert (answer["from"], answer["to"]) == ("super-60", "super-70")
    assert float(answer["points"]) == pytest.approx(100 * (accuracy["super-70"] - accuracy["super-60"]))
    stored = records.load(report / "records")
    assert {record["cell"]: record["result"]["accuracy"] for record in stored} == accuracy
    page = (report / "study.html").read_text()
    assert "One thing at a time" in page
    assert NAME.format("super-70") in page


def test_a_list_of_the_cells_says_how_far_they_are_and_runs_nothing(ended, study):
    _, begin = study
    job = begin("--variants", "none", "--only", *ONLY, "constant-60", "--dry-run")
    assert job.wait() == 0
    states = {line.split()[2]: line.split()[1] for line in job.output().splitlines() if line[:3].strip().isdigit()}
    assert states == {NAME.format(label): "done" for label in ONLY} | {NAME.format("constant-60"): "waiting"}
    assert f"{sys.executable}" not in job.output()
    assert not os.path.exists(study[0] / NAME.format("constant-60"))
