"""Comparisons of runs: a real run of docs/results with a made-up report, and a run that was stopped."""

import json
import shutil
from pathlib import Path

import pytest

from cnnopt.compare import main, markdown, read
from cnnopt.export.render import SCHEMA
from tests.helpers import ROOT

RESULTS = ROOT / "docs" / "results"


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
    shutil.copytree(RESULTS / "resnet20-np2-4epochs", tmp_path / "resnet20-np2-4epochs")
    shutil.copytree(Path(__file__).with_name("unfinished_run"), tmp_path / "unfinished")
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
    assert text == markdown([read(path) for path in runs])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    finished, stopped = (next(row for row in rows if row[0] == path.name) for path in runs)
    assert finished[1:4] == ["4", "80.46", "60.00"]
    assert finished[-1] == "-"
    assert stopped[1] == "5 of 30"
    assert "--epochs 30" in stopped[-1]
    assert ["resnet20-np2-4epochs", "int8", "80.39", "195.3", "156.2", "6.25x", "1.34"] in rows
    assert ["resnet20-np2-4epochs", "int8-qat", "80.39", "244.1", "", "4.00x", "1.34"] in rows
    assert not any("float16" in row for row in rows)
    assert (tmp_path / "out/comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "80.46" in capsys.readouterr().out
    html = (tmp_path / "out/comparison.html").read_text()
    assert "resnet20-np2-4epochs: int8: 6.2x smaller, 0.0 points lost, 1.0x faster" in html
    assert "unfinished: not quantized" in html
    assert all(f"<title>resnet20-np2-4epochs: {name}: " in html for name in ("float16", "int8", "int8-qat"))


def test_what_cannot_be_compared_is_one_line(runs, tmp_path, capsys):
    def refused(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith("cnnopt.compare: ")
        assert line.count("\n") == 1
        return line

    assert "config.json: No such file" in refused(tmp_path / "none")
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
    (tmp_path / "file").write_text("")
    assert "--output" in refused(runs[1], "--output", tmp_path / "file")
