"""Put several runs side by side.

    python -m cnnopt.compare runs/A runs/B ... [--output DIR]
    python -m cnnopt.compare runs

Prints a table of the runs' results, and one of the measurements of their files by ``cnnopt.quantize``. A folder that
holds run folders stands for all of them. Complete runs that differ in their seed only, and were computed on as many
ranks, the same kind of device and in the same precision, are one row: the mean, and the standard deviation after ±.
``lost`` are the points of accuracy below the dense run among them that has the same data set, depth and epochs; for a
file, else below the --baseline of its report. With ``--output`` also writes DIR/comparison.md, .png and .html. Exit
status: 0 done, 1 failed, 2 wrong input.
"""

from __future__ import annotations

import io
import itertools
import re
import statistics
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from cnnopt.command_line import Parser, one_line
from cnnopt.errors import UserError
from cnnopt.export import page
from cnnopt.export.shipped import MEANING, shipped
from cnnopt.groups import Group, Run, Spread, by_settings, find, read
from cnnopt.output import need_readers
from cnnopt.run import atomic_files
from cnnopt.run.run_folder import minutes, monitored

#: The files of a run that a comparison lists with accuracy and size.
COMPARED = ("float32", "int8", "clustered-int8", "int8-qat", "clustered-int8-qat")
COLUMNS = ("run", "runs", "epochs", "val %", "test %", "lost", "zeros", "img/s", "min")
FILE_COLUMNS = ("run", "file", "test %", "lost", "KiB", "smaller", "ms", "faster")
#: Settings of pruning. A run without zeros may have any.
PRUNING = ("sparsity", "initial_sparsity", "prune_")


class ComparisonError(UserError):
    """Runs that cannot be compared. The message is one line that names the folder and the remedy."""


def dense_for(group: Group, groups: Sequence[Group]) -> Group | None:
    """The dense group with the same data set, depth and epochs, and the fewest other settings that differ."""
    own = group.identity
    others = [
        other
        for other in groups
        if other.identity.get("sparsity") == 0
        and other.runs[0].finished
        and all(other.identity.get(name) == own.get(name) for name in ("dataset", "depth", "epochs"))
    ]
    return min(others, key=lambda other: len(differences(other, group)), default=None)


def differences(group: Group, other: Group) -> list[str]:
    """The flags of ``group`` that ``other`` does not have, except those of pruning if ``group`` is dense."""
    dense = group.identity.get("sparsity") == 0
    return [
        f"--{name.replace('_', '-')} {value}"
        for name, value in group.identity.items()
        if other.identity.get(name) != value and not (dense and name != "sparsity" and name.startswith(PRUNING))
    ]


def training_rows(groups: Sequence[Group]) -> list[list[str]]:
    """One row for each group: the last epoch, and the speed."""
    rows = []
    for group in groups:
        first, dense = group.runs[0], dense_for(group, groups)
        of_all = first.identity.get("epochs", "?")
        accuracy = group.spread(Run.test_accuracy)
        # A run that is still at a high rate would seem to have lost much.
        lost = dense and first.finished and accuracy and dense.spread(Run.test_accuracy)
        speed = group.spread(
            lambda run: statistics.median(e["images_per_second"] for e in run.metrics) if run.metrics else None
        )
        cells = (
            _text(group.spread(Run.validation_accuracy), 2),
            _text(accuracy, 2),
            f"{lost.mean - accuracy.mean:.2f}" if lost and accuracy and dense is not group else "",
            _text(group.spread(lambda run: 100 * run.last["sparsity"] if run.last else None), 2, "%"),
            _text(speed, 0),
            _text(group.spread(lambda run: minutes(run.metrics) if run.metrics else None), 1),
        )
        done = str(of_all) if first.finished else f"{first.last.get('epoch', 0)} of {of_all}"
        rows.append([group.name, str(len(group.runs)) if len(group.runs) > 1 else "", done, *cells])
    return rows


def trained(group: Group, seeds: Sequence[int]) -> Spread | None:
    """The test accuracy of the runs with these seeds; of all runs if none has one of them."""
    return Spread.of(run.test_accuracy() for run in group.runs if run.seed in seeds) or group.spread(Run.test_accuracy)


def file_rows(groups: Sequence[Group]) -> list[list[str]]:
    """One row for each compared file of each group that ``cnnopt.quantize`` has measured."""
    rows = []
    for group in groups:
        dense = dense_for(group, groups)
        for name in COMPARED:
            measured = [(e, run) for run in group.runs if run.card for e in run.card["files"] if e["name"] == name]
            if not measured:
                continue
            entries = [(entry, run.card) for entry, run in measured if run.card]
            accuracy = Spread.of(100 * entry["test"]["accuracy"] for entry, _ in entries)
            against = (dense and trained(dense, [run.seed for _, run in measured])) or Spread.of(
                100 * page.reference(card)["test"]["accuracy"]
                for _, card in entries
                if card["reference"].get("kind") == "baseline"
            )
            rows.append(
                [
                    group.name,
                    name,
                    _text(accuracy, 2),
                    f"{against.mean - accuracy.mean:.2f}" if against and accuracy else "",
                    _text(Spread.of(shipped(entry).bytes / 1024 for entry, _ in entries), 1),
                    _text(Spread.of(shipped(entry).times_smaller for entry, _ in entries), 2, "x"),
                    _text(Spread.of(_milliseconds(entry) for entry, _ in entries), 2),
                    _text(
                        Spread.of(_milliseconds(page.reference(card)) / _milliseconds(e) for e, card in entries), 2, "x"
                    ),
                ]
            )
    return rows


def _by_first(rows: Sequence[Sequence[str]]) -> list[tuple[str, list[Sequence[str]]]]:
    return [(name, list(some)) for name, some in itertools.groupby(rows, lambda row: row[0])]


def _milliseconds(entry: dict[str, Any]) -> float:
    return entry["latency"][0]["median_ms"]


def _text(spread: Spread | None, digits: int, unit: str = "") -> str:
    return spread.text(digits, unit) if spread else ""


def tables(groups: Sequence[Group], *, short: bool = False) -> list[tuple[list[str], list[list[str]]]]:
    """Columns and rows of the tables that have any rows, without columns that are empty.

    ``short``: with the deviation of the accuracy only.
    """
    found = []
    for columns, rows in ((COLUMNS, training_rows(groups)), (FILE_COLUMNS, file_rows(groups))):
        if short:
            rows = [
                [c if columns[i] == "test %" else re.sub(r" ±[\d.]+", "", c) for i, c in enumerate(r)] for r in rows
            ]
        kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
        if rows:
            found.append(([columns[i] for i in kept], [[row[i] for i in kept] for row in rows]))
    return found


#: The text before each of the two tables.
LEGENDS = (
    "`test %`: the last epoch, mean ± standard deviation where several runs differ in their seed only; `val %`: the "
    "same of validation images; `lost`: points below the dense run of the same data set, depth and epochs.",
    "Files as `cnnopt.quantize` has measured them. `lost`: points below the dense run, or else below the report's "
    f"`--baseline`; `KiB`: as it is shipped; `smaller`: {MEANING}; `faster`: than that reference; `ms`: median of one "
    "image at one thread.",
)


def settings(groups: Sequence[Group]) -> list[str]:
    """A line for each group that has other settings than the first, or was computed in another way."""

    def computed(group: Group) -> list[str]:
        first = groups[0].runs[0].computed
        return [f"{name} {value}" for name, value in group.runs[0].computed.items() if first.get(name) != value]

    found = ((group.name, [*differences(group, groups[0]), *computed(group)]) for group in groups[1:])
    return [f"{name}: {' '.join(flags)}" for name, flags in found if flags]


def markdown(groups: Sequence[Group]) -> str:
    """The text of comparison.md."""
    lines = [f"# {', '.join(group.name for group in groups)}", ""]
    for legend, (columns, rows) in zip(LEGENDS, tables(groups), strict=False):
        lines += [legend, "", *("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)), ""]
    if other := settings(groups):
        lines += [f"Settings other than those of {groups[0].name}:", "", *(f"- {line}" for line in other), ""]
    return "\n".join([*lines, "![accuracy by epoch, accuracy against size](comparison.png)", ""])


def sections(groups: Sequence[Group]) -> list[str]:
    """The tables as sections of comparison.html."""
    found = []
    for title, legend, (columns, rows) in zip(("Results", "Files"), LEGENDS, tables(groups), strict=False):
        kinds = ["" if name in ("run", "file") else "n" for name in columns]
        lines = [
            "".join(f'<{tag} class="{k}">{escape(c)}</{tag}>' for k, c in zip(kinds, cells, strict=True))
            for tag, cells in (("th", columns), *(("td", row) for row in rows))
        ]
        note = escape(legend).replace("`", "")
        table = f"<div class=scroll><table><tr>{'</tr><tr>'.join(lines)}</tr></table></div><p class=small>{note}</p>"
        found.append(page.section(title, table, "wide"))
    return found


def png(groups: Sequence[Group]) -> bytes:
    """comparison.png: accuracy by epoch and, if files were measured, accuracy against compressed size."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Ignore the settings of the user's matplotlibrc.
    matplotlib.rcdefaults()
    measured = any(run.card for group in groups for run in group.runs)
    figure = Figure(figsize=(13 if measured else 7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    curves, *others = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    for number, group in enumerate(groups):
        for run in group.runs:
            style = {"color": f"C{number}", "label": group.name if run is group.runs[0] else None}
            epochs = [line["epoch"] for line in run.metrics]
            curves.plot(epochs, [100 * line[f"{monitored(line)}_accuracy"] for line in run.metrics], **style)
            if run.card:
                entries = [entry for entry in run.card["files"] if entry["name"] in COMPARED]
                points = [(shipped(entry).bytes / 1024, 100 * entry["test"]["accuracy"]) for entry in entries]
                others[0].plot(*zip(*points, strict=True), "o", **style)
                for entry, point in zip(entries, points, strict=True):
                    others[0].annotate(
                        entry["name"], point, fontsize="x-small", xytext=(4, 3), textcoords="offset points"
                    )
    curves.set(xlabel="epoch", ylabel="accuracy on validation images, or else on test images, %")
    for sizes in others:
        sizes.set(xscale="log", xlabel="KiB, packed or gzip -9", ylabel="test accuracy, %")
    for axes in (curves, *others):
        axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    return image.getvalue()


def fit(names: Sequence[str], width: int) -> list[str]:
    """The names, cut to ``width`` where they are longer, if they still differ; else whole.

    Parts between hyphens that all names begin or end with are cut first, then the middle.
    """
    parts = {name: name.split("-") for name in names}
    fewest = min(map(len, parts.values())) - 1 if len(parts) > 1 else 0
    heads, tails = zip(*parts.values(), strict=False), zip(*(p[::-1] for p in parts.values()), strict=False)
    head = min(fewest, sum(1 for _ in itertools.takewhile(lambda same: len(set(same)) == 1, heads)))
    tail = min(fewest - head, sum(1 for _ in itertools.takewhile(lambda same: len(set(same)) == 1, tails)))
    short = {}
    for name, own in parts.items():
        if len(name) <= width:
            short[name] = name
            continue
        text = ("…" if head else "") + "-".join(own[head : len(own) - tail]) + ("…" if tail else "")
        half = (width - 1) // 2
        short[name] = text if len(text) <= width else f"{text[: width - 1 - half]}…{text[-half:]}"
    return [short[name] for name in names] if len(set(short.values())) == len(short) else list(names)


def show(groups: Sequence[Group]) -> None:
    """Print the tables, and the settings in which the groups differ."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # force_terminal overrides $FORCE_COLOR, which would write a terminal's control codes into a log.
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False, markup=False)
    for columns, rows in tables(groups, short=True):
        if "file" in columns:
            # A group's name takes a line, and its files the lines below.
            columns = columns[1:]
            named = [(name, [[f"  {row[1]}", *row[2:]] for row in some]) for name, some in _by_first(rows)]
            rows = [row for name, some in named for row in ([name, *[""] * (len(columns) - 1)], *some)]
        others = [max(len(cells[i]) for cells in (columns, *rows)) + 2 for i in range(1, len(columns))]
        names = [row[0] for row in rows if not row[0].startswith(" ")]
        fitting = dict(zip(names, fit(names, max(16, console.width - sum(others) - 2)), strict=True))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for i, column in enumerate(columns):
            table.add_column(column, overflow="fold", justify="right" if i else "left", no_wrap=i > 0)
        for row in rows:
            table.add_row(fitting.get(row[0], row[0]), *row[1:])
        console.print(table)
    if other := settings(groups):
        console.print(f"settings other than those of {groups[0].name}:")
        for line in other:
            console.print(f"  {line}", soft_wrap=True)


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="python -m cnnopt.compare", description=__doc__)
    made.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run folder, or a folder of some; the one to compare with first",
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="where comparison.md, .png and .html go")
    return made


@one_line("cnnopt.compare")
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Every expected failure prints one line and gives an exit status."""
    given = parser().parse_args(argv)
    runs = [read(path) for path in find(given.runs)]
    groups = by_settings(runs)
    show(groups)
    if given.output:
        try:
            given.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ComparisonError(f"--output {given.output}: {error.strerror}; name another folder") from None
        atomic_files.replace(given.output / "comparison.md", markdown(groups))
        atomic_files.replace(given.output / "comparison.png", png(groups))
        atomic_files.replace(given.output / "comparison.html", page.comparison_page(runs, first=sections(groups)))
    return 0


if __name__ == "__main__":
    need_readers()
    sys.exit(main())
