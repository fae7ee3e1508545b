"""Comparisons of runs: a real run on CIFAR-10 with a made-up report, and a run that was stopped."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cnnopt.compare import fit, main, markdown
from cnnopt.export.render import SCHEMA
from cnnopt.groups import by_settings, read
from tests.helpers import ROOT

RUNS = Path(__file__).with_name("runs")


def entry(name, *, gzip, packed=None):
    return {
        "name": name, "test": {"accuracy": 0.8039, "correct": 8039, "images": 10_000}, "size": {"gzip": gzip},
        "latency": [{"median_ms": 1.345, "p99_ms": 2}],
        "times_smaller": {"gzip": 1_000_000 / gzip},
        "packed": packed and {"bytes": packed, "times_smaller": 1_000_000 / packed},
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """A quantized run and one that was stopped."""
    shutil.copytree(RUNS / "resnet20-np2-4epochs", tmp_path / "resnet20-np2-4epochs")
    shutil.copytree(RUNS / "unfinished", tmp_path / "unfinished")
    files = [
        entry("float16", gzip=300_000),
        entry("int8", gzip=200_000, packed=160_000),
        entry("int8-qat", gzip=250_000),
    ]
    card = {"schema": SCHEMA, "files": files, "reference": {"file": "float16"}}
    (tmp_path / "resnet20-np2-4epochs/report.json").write_text(json.dumps(card))
    return [tmp_path / "resnet20-np2-4epochs", tmp_path / "unfinished"]


def test_a_comparison_holds_what_the_runs_have_recorded(runs, tmp_path, capsys):
    assert main([*map(str, runs), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/comparison.md").read_text()
    assert text == markdown(by_settings([read(path) for path in runs]))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    finished, stopped = (next(row for row in rows if row[0] == path.name) for path in runs)
    assert finished[1:4] == ["4", "80.46", "60.00%"]
    assert stopped[1] == "5 of 30"
    (other,) = (line for line in text.splitlines() if line.startswith("- unfinished: "))
    assert "--epochs 30" in other
    assert ["resnet20-np2-4epochs", "int8", "80.39", "156.2", "6.25x", "1.34", "1.00x"] in rows
    assert ["resnet20-np2-4epochs", "int8-qat", "80.39", "244.1", "4.00x", "1.34", "1.00x"] in rows
    assert not any("float16" in row for row in rows)
    assert (tmp_path / "out/comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "80.46" in capsys.readouterr().out
    html = (tmp_path / "out/comparison.html").read_text()
    assert "resnet20-np2-4epochs: int8: 6.2x smaller, 0.0 points lost, 1.0x faster" in html
    assert "unfinished: not quantized" in html
    assert all(f"<title>resnet20-np2-4epochs: {name}: " in html for name in ("float16", "int8", "int8-qat"))


def test_runs_of_one_name_have_separate_colours(runs, tmp_path):
    for folder in ("a", "b"):
        shutil.copytree(runs[0], tmp_path / folder / "run")
    assert main([str(tmp_path / "a/run"), str(tmp_path / "b/run"), "--output", str(tmp_path / "out")]) == 0
    html = (tmp_path / "out/comparison.html").read_text()
    assert [html.count(f'<div class="bar c{color}"') for color in (0, 1)] == [3, 3]


@pytest.fixture
def dense_and_pruned(tmp_path):
    """A folder of runs: three seeds of a pruned network, of which two are quantized, and a dense one."""
    folder = tmp_path / "runs"
    for name in ("resnet20-muon-decay-seed0", "resnet20-muon-decay-seed1", "resnet20-muon-decay-seed2",
                 "resnet20-dense-muon-seed0"):  # fmt: skip
        shutil.copytree(RUNS / name, folder / name)
    for seed, (accuracy, gzip, ms) in enumerate([(0.90, 100 * 1024, 1.0), (0.92, 200 * 1024, 3.0)]):
        files = [
            {**entry("float32", gzip=10**6), "latency": [{"median_ms": 6.0, "p99_ms": 7}]},
            {**entry("int8", gzip=gzip), "latency": [{"median_ms": ms, "p99_ms": 9}],
             "test": {"accuracy": accuracy, "correct": round(10_000 * accuracy), "images": 10_000}},
        ]  # fmt: skip
        card = {"schema": SCHEMA, "files": files, "reference": {"file": "float32", "kind": "self"}}
        (folder / f"resnet20-muon-decay-seed{seed}/report.json").write_text(json.dumps(card))
    return folder


def test_runs_of_several_seeds_are_one_row_beside_the_dense_run(dense_and_pruned, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([str(dense_and_pruned)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    # 91.66, 91.03 and 91.10, beside 92.22.
    assert ["resnet20-muon-decay", "3", "30", "91.26", "±0.35", "0.96", "60.00%", "532", "48.8"] in rows
    assert ["30", "92.22", "0.00%", "969", "26.0"] in [row[1:] for row in rows]
    # 100 and 200 KiB against 10^6 bytes; 6 ms against 1 and 3 ms; 91.00 against 92.22.
    assert ["int8", "91.00", "±1.41", "1.22", "150.0", "7.32x", "2.00", "4.00x"] in rows


def test_a_file_of_a_dense_run_has_lost_what_its_own_run_had(dense_and_pruned):
    dense = dense_and_pruned / "resnet20-dense-muon-seed0"
    shutil.copytree(dense, dense_and_pruned / "other")
    config = json.loads((dense_and_pruned / "other/config.json").read_text())
    config["identity"]["seed"] = 1
    (dense_and_pruned / "other/config.json").write_text(json.dumps(config))
    result = json.loads((dense_and_pruned / "other/result.json").read_text())
    (dense_and_pruned / "other/result.json").write_text(json.dumps({**result, "accuracy": 0.5}))
    card = {"schema": SCHEMA, "files": [entry("int8", gzip=1024)], "reference": {"file": "int8", "kind": "self"}}
    (dense / "report.json").write_text(json.dumps(card))
    rows = markdown(by_settings([read(dense), read(dense_and_pruned / "other")])).splitlines()
    # 80.39 beside 92.22 of seed 0, not beside the mean with 50.00.
    assert any("| int8 | 80.39 | 11.83 |" in row for row in rows)


def test_runs_on_other_ranks_are_another_row(dense_and_pruned, capsys):
    folder = dense_and_pruned / "resnet20-muon-decay-seed1"
    environment = json.loads((folder / "env.json").read_text())
    (folder / "env.json").write_text(json.dumps({**environment, "ranks": 4}))
    assert main([str(dense_and_pruned)]) == 0
    settings = [line for line in capsys.readouterr().out.splitlines() if "muon-decay-seed1: " in line]
    assert len(settings) == 1
    assert settings[0].endswith(" ranks 4")


@pytest.mark.parametrize("kind", ["self", "baseline"])
def test_points_are_lost_against_a_dense_run_only(kind, dense_and_pruned):
    run = dense_and_pruned / "resnet20-muon-decay-seed0"
    card = json.loads((run / "report.json").read_text())
    card["reference"]["kind"] = kind
    (run / "report.json").write_text(json.dumps(card))
    rows = [line.split("|")[1:-1] for line in markdown(by_settings([read(run)])).splitlines() if " int8 " in line]
    # The reference has 80.39.
    assert [cell.strip() for cell in rows[0]][2:4] == ["90.00", "-9.61"] if kind == "baseline" else ["90.00", "97.7"]


def test_names_are_cut_where_they_are_equal():
    names = ["cifar10-resnet20-dense-auto-seed0", "cifar10-resnet20-constant60-auto-seed0"]
    assert fit(names, 40) == names
    assert fit(names, 16) == ["…dense…", "…constant60…"]
    assert fit(names, 36) == [names[0], "…constant60…"]
    assert fit(names, 7) == ["…dense…", "…co…60…"]
    # Two names that would become equal stay whole.
    assert fit(["aaaa1bbbb", "aaaa2bbbb"], 5) == ["aaaa1bbbb", "aaaa2bbbb"]
    assert fit(["a-long-name"], 6) == ["a-l…me"]


def test_what_cannot_be_compared_is_one_line(runs, tmp_path, capsys):
    def refused(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith("cnnopt.compare: ")
        assert line.count("\n") == 1
        return line

    assert "config.json: No such file" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "neither a run folder nor a folder of some" in refused(tmp_path / "empty")
    (runs[0] / "report.json").write_text('{"schema": 1}')
    assert "another version" in refused(*runs)
    (runs[0] / "report.json").write_text(json.dumps({"schema": SCHEMA}))
    assert "another version" in refused(*runs)
    (runs[0] / "report.json").write_text("[")
    assert "report.json is damaged" in refused(*runs)
    (runs[1] / "metrics.jsonl").rename(runs[1] / "kept.jsonl")
    (runs[1] / "metrics.jsonl").mkdir()
    assert "metrics.jsonl: Is a directory" in refused(runs[1])
    (runs[1] / "metrics.jsonl").rmdir()
    (runs[1] / "kept.jsonl").rename(runs[1] / "metrics.jsonl")
    (runs[0] / "config.json").write_text("[" * 100_000)
    assert "config.json is damaged" in refused(*runs)
    # No file may grow beyond 1 KiB.
    command = f"ulimit -f 1; exec {sys.executable} -m cnnopt.compare {runs[1]} --output {tmp_path}/out"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{tmp_path}/out/comparison.png: cannot be written (File too large)" in done.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["comparison.md"]
    (tmp_path / "file").write_text("")
    assert "--output" in refused(runs[1], "--output", tmp_path / "file")
