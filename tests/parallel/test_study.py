"""cnnopt.study on real runs: four cells of a ResNet-8, interrupted, killed, with one that fails, and their tables."""

import csv
import json
import signal
import time

import psutil
import pytest

from cnnopt.grid import records
from cnnopt.run.run_folder import RunFolder

pytestmark = pytest.mark.timeout(900)
#: In the order in which they run.
RANKS = {"polynomial-60": 1, "super-60": 2, "baseline": 1, "constant-60": 1}
FLAGS = ["--scale", "0.01", "--np", "2", "--dataset", "digits", "--depth", "8", "--seed", "0"]
NAMES = {label: f"original-digits-resnet8-{label}-3epochs-seed0" for label in RANKS}


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended. A zombie has, and nobody has waited for it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def study(start, tmp_path_factory):
    """The folder of the study, and a function that starts it."""
    run_dir = tmp_path_factory.mktemp("study")

    def begin(*flags: str):
        command = ["-m", "cnnopt.study", *FLAGS, "--run-dir", str(run_dir), "--only", *RANKS, *flags]
        return start(1, *command, launcher=())

    return run_dir, begin


@pytest.fixture(scope="module")
def ended(study):
    """The study after an interruption, a kill and a failure: its folder, and status and output of each start."""
    run_dir, begin = study
    folders = {label: run_dir / name for label, name in NAMES.items()}
    said = {}
    # A run of other settings, which the study must leave alone.
    folders["constant-60"].mkdir()
    other = folders["constant-60"] / "config.json"
    other.write_text(json.dumps({"identity": {"dataset": "cifar10"}, "name": other.parent.name}))

    job = begin("--variants", "none")
    job.wait_until(lambda _: (folders["polynomial-60"] / "config.json").exists())
    job.process.send_signal(signal.SIGINT)
    said["interrupted"] = job.wait(), job.output()

    job = begin("--variants", "none")
    job.wait_until(lambda _: (folders["baseline"] / "config.json").exists())
    left = psutil.Process(job.process.pid).children(recursive=True)
    job.process.kill()
    job.wait()
    end = time.monotonic() + 60
    while any(runs(child) for child in left):
        assert time.monotonic() < end, "ranks outlive the study"
        time.sleep(0.2)
    trained = folders["super-60"] / "result.json"
    written = trained.stat().st_mtime_ns

    job = begin("--variants", "none")
    said["failed"] = job.wait(), job.output()
    other.unlink()
    job = begin("--variants", "float32,int8", "--only", "constant-60")
    said["last"] = job.wait(), job.output()
    assert trained.stat().st_mtime_ns == written, "a cell that was complete was trained again"
    return run_dir, said


def test_after_ctrl_c_a_kill_and_a_failure_the_same_command_goes_on(ended):
    _, said = ended
    status, output = said["interrupted"]
    assert status == 130, output
    assert "stopped; the same command goes on from here" in output
    status, output = said["failed"]
    assert status == 1, output
    assert "3 of 4 cells are done" in output
    (failure,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert NAMES["constant-60"] in failure
    assert "holds a run of another configuration" in failure
    assert said["last"][0] == 0, said["last"][1]
    assert "1 of 1 cells are done" in said["last"][1]


def test_each_cell_is_a_run_on_its_ranks(ended):
    run_dir, _ = ended
    for label, ranks in RANKS.items():
        folder = RunFolder(run_dir / NAMES[label])
        assert json.loads((folder.path / "env.json").read_text())["ranks"] == ranks
        assert [line["epoch"] for line in folder.metrics()] == [1, 2, 3]
        assert folder.result()["sparsity"] == pytest.approx(0 if label == "baseline" else 0.6, abs=1e-3)


def test_the_tables_hold_what_the_run_folders_hold(ended):
    run_dir, _ = ended
    report = run_dir / "report"
    results = {label: RunFolder(run_dir / name).result() for label, name in NAMES.items()}
    accuracy = {label: 100 * result["test_accuracy"] for label, result in results.items()}
    rows = {row["cell"]: row for row in csv.DictReader((report / "accuracy.csv").read_text().splitlines())}
    assert {label: float(row["ours %"]) for label, row in rows.items()} == pytest.approx(accuracy)
    ratio = accuracy["super-60"] / accuracy["polynomial-60"]
    assert float(rows["super-60"]["ours / our polynomial-60"]) == pytest.approx(ratio)

    card = json.loads((run_dir / NAMES["constant-60"] / "report.json").read_text())
    gzip = {entry["name"]: entry["size"]["gzip"] for entry in card["files"]}
    files = {row["file"]: row for row in csv.DictReader((report / "sizes.csv").read_text().splitlines())}
    assert {name: float(row["our bytes"]) for name, row in files.items()} == gzip
    assert float(files["int8"]["our ratio"]) == pytest.approx(gzip["float32"] / gzip["int8"])

    answers = {
        (row["from"], row["to"]): row for row in csv.DictReader((report / "questions.csv").read_text().splitlines())
    }
    points = float(answers["constant-60", "polynomial-60"]["points"])
    assert points == pytest.approx(accuracy["polynomial-60"] - accuracy["constant-60"])

    stored = records.load(report / "records")
    assert {record["cell"]: 100 * record["result"]["accuracy"] for record in stored} == pytest.approx(accuracy)
    page = (report / "study.html").read_text()
    assert "One thing at a time" in page
    assert NAMES["super-60"] in page


def test_a_list_of_the_cells_says_how_far_they_are_and_runs_nothing(ended, study):
    run_dir, begin = study
    job = begin("--variants", "none", "--only", *RANKS, "mixed", "--dry-run")
    assert job.wait() == 0
    states = {line.split()[2]: line.split()[1] for line in job.output().splitlines() if line[:3].strip().isdigit()}
    mixed = NAMES["baseline"].replace("baseline", "mixed")
    assert states == {**dict.fromkeys(NAMES.values(), "done"), mixed: "waiting"}
    assert not (run_dir / mixed).exists()


def test_a_damaged_cell_does_not_stop_the_others(ended, study):
    run_dir, begin = study
    config = run_dir / NAMES["baseline"] / "config.json"
    kept = config.read_text()
    config.write_text("{")
    result = run_dir / NAMES["constant-60"] / "result.json"
    result.unlink()
    try:
        job = begin("--variants", "none", "--only", "baseline", "constant-60")
        assert job.wait() == 1
    finally:
        config.write_text(kept)
    assert "1 of 2 cells are done" in job.output()
    assert f"failed: {NAMES['baseline']}: {config} is damaged" in job.output()
    assert f"failed: {NAMES['constant-60']}" not in job.output()
    assert result.exists()
    assert f"cnnopt.study: no tables and figures: {config} is damaged" in job.output()


def test_a_cell_that_another_study_runs_is_left_to_it(ended, study):
    import filelock

    run_dir, begin = study
    folder = run_dir / NAMES["super-60"]
    (folder / "result.json").rename(folder / "kept.json")
    try:
        with filelock.FileLock(folder / ".study.lock"):
            job = begin("--variants", "none", "--only", "super-60")
            assert job.wait() == 0, job.output()
        assert "another study runs it" in job.output()
        assert "0 of 1 cells are done" in job.output()
    finally:
        (folder / "kept.json").rename(folder / "result.json")
