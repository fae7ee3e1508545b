"""Runs are found in folders and grouped by everything but the seed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cnnopt.groups import GroupError, Run, Spread, by_settings, find, read
from tests.helpers import ROOT
from tests.helpers.permissions import stopped_by_permissions

RUNS = Path(__file__).with_name("runs")


def run(name: str, *, finished: bool = True, ranks: int = 1, **identity: object) -> Run:
    return Run(name, {"depth": 20, "seed": 0, **identity}, {"ranks": ranks}, [], {} if finished else None, None)


def test_only_the_seed_may_differ_in_a_group():
    runs = [run("a-seed0"), run("a-seed1", seed=1), run("a-seed2", seed=2, depth=44), run("b-seed2", seed=2, ranks=2)]
    found = [[r.name for r in group.runs] for group in by_settings(runs)]
    assert found == [["a-seed0", "a-seed1"], ["a-seed2"], ["b-seed2"]]


def test_a_second_run_with_the_same_seed_is_in_another_group():
    runs = [run("a"), run("b"), run("c", seed=1), run("d", seed=1), run("e")]
    assert [[r.name for r in group.runs] for group in by_settings(runs)] == [["a", "c"], ["b", "d"], ["e"]]


def test_a_run_that_is_not_complete_stands_alone():
    groups = by_settings([run("a"), run("b", finished=False), run("c", finished=False), run("d", seed=1)])
    assert [[r.name for r in group.runs] for group in groups] == [["a", "d"], ["b"], ["c"]]


def test_groups_have_names_that_differ():
    runs = [run("a-seed0"), run("a-seed1", seed=1), run("a", depth=8), run("a", depth=14), run("seed0", depth=32)]
    assert [group.name for group in by_settings(runs)] == ["a", "a (2)", "a (3)", "seed0"]


def test_a_spread_is_the_mean_and_the_deviation_of_a_sample():
    spread = Spread.of([1.0, None, 2.0, 6.0])
    assert (spread.mean, spread.count) == (3, 3)
    assert spread.deviation == pytest.approx(7**0.5)
    assert spread.text(1) == "3.0 ±2.6"
    assert Spread.of([2.0]) == Spread(2.0, None, 1)
    assert Spread.of([None]) is None


def test_the_recorded_runs_are_grouped_as_they_were_made():
    groups = by_settings([read(path) for path in find([RUNS])])
    (three,) = (group for group in groups if len(group.runs) > 1)
    assert three.name == "resnet20-muon-decay"
    accuracies = [json.loads((RUNS / r.name / "result.json").read_text())["accuracy"] for r in three.runs]
    assert three.spread(lambda run: run.last["test_accuracy"]) == Spread.of(accuracies)


def test_a_folder_of_runs_is_all_of_its_runs_each_once(tmp_path: Path):
    for name in ("b", "a"):
        shutil.copytree(RUNS / "resnet20-muon-decay-seed1", tmp_path / name)
    (tmp_path / "c").mkdir()
    assert find([tmp_path / "b", tmp_path]) == [tmp_path / "b", tmp_path / "a"]
    with pytest.raises(GroupError, match="neither a run folder nor a folder of some"):
        find([tmp_path / "c"])


@pytest.mark.parametrize(("closed", "status"), [("lost+found", 0), (".", 2)])
def test_a_folder_that_may_not_be_entered_is_no_run(closed, status, tmp_path: Path):
    runs = tmp_path / "runs"
    shutil.copytree(RUNS / "resnet20-muon-decay-seed1", runs / "a")
    (runs / closed).mkdir(exist_ok=True)
    (runs / closed).chmod(0)
    command = [sys.executable, "-m", "cnnopt.compare", str(runs)]
    try:
        done = subprocess.run(stopped_by_permissions(command), cwd=ROOT, capture_output=True, text=True, timeout=60)
    finally:
        (runs / closed).chmod(0o700)
    assert done.returncode == status
    expected = f"cnnopt.compare: {runs}: Permission denied; name a folder that may be read\n" if status else ""
    assert done.stderr == expected
