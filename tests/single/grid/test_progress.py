"""How far a cell of a study is, by what its run folder holds."""

import json

import pytest

from cnnopt.export.render import SCHEMA
from cnnopt.grid.cells import choose, expand, recipe
from cnnopt.grid.progress import measured

STEP = 96


@pytest.fixture
def cell(tmp_path):
    (found,) = choose(
        expand(recipe("ours"), scale=0.1, ranks=1, run_dir=str(tmp_path), datasets=["digits"], depths=[8], seeds=[0]),
        ["super-60"],
    )
    found.folder.mkdir()
    return found


def report(cell, *, clusters=16, packed={"bytes": 100}, step=STEP, schema=SCHEMA):  # noqa: B006
    files = [
        {"name": "float32", "packed": None},
        {"name": "int8", "packed": packed},
        {"name": "clustered-int8", "packed": packed},
    ]
    content = {"schema": schema, "run": {"step": step, "clusters": clusters}, "files": files}
    (cell.folder / "report.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("made", "counted"),
    [
        ({}, ["float32", "int8", "clustered-int8"]),
        ({"clusters": 8}, ["float32", "int8"]),
        ({"packed": None}, ["float32"]),
        ({"step": STEP - 1}, []),
        ({"schema": 0}, []),
    ],
    ids=str,
)
def test_only_files_that_a_study_would_make_count_as_measured(cell, made, counted):
    report(cell, **made)
    assert measured(cell, STEP) == counted


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_a_report_that_cannot_be_read_counts_as_none(cell, content):
    if content is not None:
        (cell.folder / "report.json").write_text(content)
    assert measured(cell, STEP) == []
