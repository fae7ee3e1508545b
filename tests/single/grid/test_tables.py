"""The tables of a study, from records with made-up figures, and every form of a table."""

import csv
import dataclasses
import io
import re

import pytest

from cnnopt.grid import figures, tables
from cnnopt.grid.cells import recipe, settings_of
from cnnopt.grid.report import known, markdown
from cnnopt.grid.table import Column, Table
from cnnopt.groups import Spread

ORIGINAL = recipe("original")


def record(label, seed, accuracy, *, depth=20, dataset="cifar100", ranks=2, device="CPU", rate=100.0, files=None):
    """A record of the original recipe at 30 epochs."""
    identity = {**settings_of(ORIGINAL, label, dataset, depth, 30), "seed": seed}
    name = f"original-{dataset}-resnet{depth}-{label}-30epochs-seed{seed}"
    return {
        "name": name, "recipe": "original", "cell": label, "identity": identity, "ranks": ranks,
        "precision": "float32", "device": device, "machine": {"cpu": "a CPU"},
        "result": {"accuracy": accuracy, "sparsity": identity["sparsity"], "minutes": 5.0, "images_per_second": rate},
        "files": [
            {"name": kind, "sha256": f"{name}{kind}", "raw": 2 * size, "gzip": size, "packed": None, "accuracy": 0.3,
             "latency_ms": 1.0}
            for kind, size in (files or {}).items()
        ],
    }  # fmt: skip


def grouped(*records):
    return tables.groups(records, known())


def rows(table):
    return list(csv.DictReader(io.StringIO(table.csv())))


def test_accuracy_stands_beside_the_original_with_its_ratio_to_the_strictly_pruned_model():
    found = grouped(
        record("super-60", 0, 0.60), record("super-60", 1, 0.66), record("super-60", 2, 0.9),
        record("polynomial-60", 0, 0.40), record("polynomial-60", 1, 0.40), record("baseline", 0, 0.5, depth=44),
    )  # fmt: skip
    pruned, best, deep = rows(tables.accuracy(found))
    assert (pruned["cell"], best["cell"], deep["network"]) == ("polynomial-60", "super-60", "ResNet-44")
    assert (best["original %"], deep["original %"], deep["ours / our polynomial-60"]) == ("59.9", "50.1", "")
    assert float(best["original / its polynomial-60"]) == pytest.approx(59.9 / 37.5)
    assert float(best["ours %"]) == pytest.approx(72)
    assert float(best["ours %, deviation"]) == pytest.approx(15.8745, abs=1e-3)
    # Only the two seeds that both cells have.
    assert float(best["ours / our polynomial-60"]) == pytest.approx((1.5 + 1.65) / 2)
    assert best["ours / our polynomial-60, seeds"] == "2"
    assert (best["zeros %"], best["seeds"]) == ("60.0", "3")


def test_an_answer_is_the_difference_of_runs_with_the_same_seed():
    found = grouped(
        record("polynomial-60", 0, 0.40), record("polynomial-60", 1, 0.42),
        record("polynomial-60-augmented", 0, 0.55), record("polynomial-60-augmented", 1, 0.59),
        record("super-60", 0, 0.60), record("constant-60", 5, 0.3),
    )  # fmt: skip
    augmented, combined = rows(tables.questions(found))
    assert (augmented["from"], augmented["to"]) == ("polynomial-60", "polynomial-60-augmented")
    assert float(augmented["points"]) == pytest.approx(16)
    assert float(augmented["points, deviation"]) == pytest.approx(2**0.5)
    assert (augmented["points, seeds"], combined["points, seeds"]) == ("2", "1")
    assert "augmentation" in augmented["question"]


def test_a_study_on_one_rank_answers_with_the_cell_that_is_the_same_run():
    alone = [record("polynomial-60-augmented", 0, 0.5, ranks=1), record("super-60", 0, 0.6, ranks=1)]
    pairs = {(row["from"], row["to"]) for row in rows(tables.questions(grouped(*alone)))}
    assert pairs == {("super-60-float32", "super-60"), ("polynomial-60-augmented", "super-60")}
    # On two ranks it is another run, which is missing. And no cell is compared with itself.
    several = [record("polynomial-60-augmented", 0, 0.5, ranks=1), record("super-60", 0, 0.6)]
    pairs = {(row["from"], row["to"]) for row in rows(tables.questions(grouped(*several)))}
    assert pairs == {("polynomial-60-augmented", "super-60")}
    assert not tables.questions(grouped(record("baseline", 0, 0.5, ranks=1))).rows


def test_files_stand_beside_the_originals_and_equal_ones_are_named():
    sizes = {"float32": 1000, "int8": 400}
    found = grouped(
        record("super-60", 0, 0.6, files=sizes), record("super-60", 1, 0.6, files={"float32": 1000, "int8": 500})
    )
    float32, int8, theirs = rows(tables.sizes(found))
    assert (float32["original bytes"], int8["original bytes"]) == ("573033", "")
    assert float(int8["our ratio"]) == pytest.approx((2.5 + 2) / 2)
    assert (theirs["file"], theirs["original bytes"], theirs["our bytes"]) == ("quantized", "320560", "")
    assert float(theirs["original ratio"]) == pytest.approx(573033 / 320560)
    assert tables.twins(found) == []
    found[0].records[1]["files"][1]["sha256"] = found[0].records[0]["files"][1]["sha256"]
    (line,) = tables.twins(found)
    assert re.findall(r"seed\d, int8", line) == ["seed0, int8", "seed1, int8"]
    assert line in markdown([], [], [line])


@pytest.mark.parametrize(("device", "ours"), [("GPU", 1.5), ("CPU", None), (None, None)])
def test_a_speed_up_by_precision_is_claimed_from_gpus_alone(device, ours):
    found = grouped(
        record("baseline", 0, 0.5, device=device, rate=100), record("mixed", 0, 0.5, device=device, rate=150)
    )
    float32, mixed = rows(tables.speed(found))
    assert float(mixed["original speed-up"]) == pytest.approx(3503 / 2974)
    assert float(mixed["original min"]) == pytest.approx(2974 / 60)
    assert (float32["original speed-up"], float32["our speed-up"]) == ("", "")
    assert (float(mixed["our speed-up"]) if mixed["our speed-up"] else None) == ours


def test_accuracy_by_sparsity_has_the_families():
    found = grouped(*(record(label, 0, 0.5) for label in ("baseline", "polynomial-90", "super-60", "super-70")))
    zeros = {(row["family"], row["zeros %"], row["original %"]) for row in rows(tables.sparsity(found))}
    assert zeros == {
        ("pruned", "0.0", "44.1"), ("pruned", "90.0", "10.7"), ("super", "60.0", "59.9"), ("super", "70.0", "57.4")
    }  # fmt: skip


def test_the_original_is_not_put_beside_another_data_set():
    (row,) = rows(tables.accuracy(grouped(record("super-60", 0, 0.9, dataset="cifar10"))))
    assert (row["original %"], row["original / its polynomial-60"]) == ("", "")


def test_every_figure_is_drawn_and_always_the_same():
    records = [
        record(label, seed, 0.5 + seed / 10, files={"float32": 1000, "int8": 400})
        for label in ("baseline", "super-60", "super-70") for seed in (0, 1)
    ]  # fmt: skip
    drawn = {name: figure for name, _, figure in figures.figures(grouped(*records))}
    assert list(drawn) == ["accuracy", "sparsity", "sizes", "bytes", "speed"]
    assert figures.image(drawn["sizes"], "png")[:8] == b"\x89PNG\r\n\x1a\n"
    svg = figures.image(drawn["accuracy"], "svg")
    again = next(figure for name, _, figure in figures.figures(grouped(*records)) if name == "accuracy")
    assert svg.startswith(b"<?xml")
    assert figures.image(again, "svg") == svg


TABLE = Table(
    "name", "A title", "50% & more", (Column("what"), Column("value", ".1f", "x", spread=True), Column("n", ",d")),
    [("a_b <i>", Spread(1.25, 0.5, 2), 1000), ("c", Spread(2, None, 1), None), ("d", None, 3)],
)  # fmt: skip


def test_a_table_in_each_form():
    assert TABLE.markdown().splitlines()[2:] == ["| a_b <i> | 1.2x ± 0.5 | 1,000 |", "| c | 2.0x |  |", "| d |  | 3 |"]
    assert TABLE.csv().splitlines() == [
        "what,value,\"value, deviation\",\"value, seeds\",n", "a_b <i>,1.25,0.5,2,1000", "c,2,,1,", "d,,,,3"
    ]  # fmt: skip
    latex = TABLE.latex()
    assert r"\begin{tabular}{lrr}" in latex
    assert r"a\_b <i> & 1.2x $\pm$ 0.5 & 1,000 \\" in latex
    assert r"\caption{A title. 50\% \& more}" in latex
    html = TABLE.html()
    assert "a_b &lt;i&gt;" in html
    assert '<td class="n">1.2x ± 0.5</td>' in html


def test_what_people_read_leaves_out_a_column_without_a_value():
    table = dataclasses.replace(TABLE, rows=[("a", None, 1), ("b", None, 2)])
    assert table.markdown().splitlines() == ["| what | n |", "| --- | --- |", "| a | 1 |", "| b | 2 |"]
    assert r"\begin{tabular}{lr}" in table.latex()
    assert table.html().count("<th") == 2
    assert table.csv().splitlines()[0].split(",")[:2] == ["what", "value"]


@pytest.mark.parametrize(
    ("values", "expected"), [([], None), ([3.0], Spread(3, None, 1)), ([1.0, 3.0], Spread(2, 2**0.5, 2))]
)
def test_a_spread_is_the_mean_and_the_deviation_of_a_sample(values, expected):
    found = Spread.of(values)
    assert found == expected or found == pytest.approx(expected)
