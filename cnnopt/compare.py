"""Put several runs side by side.

    python -m cnnopt.compare runs/A runs/B ... [--output DIR]

Prints a table of each run's settings, its results, and the measurements of its files by ``cnnopt.quantize``. With
``--output`` also writes DIR/comparison.md, .png and .html (accuracy by epoch; accuracy against compressed size). Reads
only the run folders. Exit status: 0 done, 1 failed, 2 wrong input.
"""

from __future__ import annotations

import io
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnopt.command_line import Parser, one_line
from cnnopt.errors import UserError
from cnnopt.export import page
from cnnopt.export.render import SCHEMA
from cnnopt.run import atomic_files
from cnnopt.run.run_folder import RunFolder, minutes

#: The files of a run that a comparison lists with accuracy and size.
COMPARED = ("float32", "int8", "clustered-int8", "int8-qat", "clustered-int8-qat")
COLUMNS = ("run", "epochs", "test %", "sparsity %", "images/s", "minutes", "settings of its own")
FILE_COLUMNS = ("run", "file", "test %", "gzip KiB", "packed KiB", "smaller", "ms, 1 thread")


class ComparisonError(UserError):
    """Runs that cannot be compared. The message is one line that names the folder and the remedy."""


@dataclass(frozen=True)
class Run:
    """The content of a run folder. ``card`` is its report.json, or None."""

    name: str
    identity: dict[str, Any]
    metrics: list[dict[str, Any]]
    finished: bool
    card: dict[str, Any] | None


def read(path: Path) -> Run:
    """A run, finished or not. Raises UserError."""
    folder = RunFolder(path)
    identity = folder.identity("name folders that train_hvd.py made")
    metrics, finished = folder.metrics(), folder.result() is not None
    card_file = path / "report.json"
    card = atomic_files.read_json(card_file, "quantize the run again") if card_file.exists() else None
    if card is not None and (card.get("schema") != SCHEMA or not isinstance(card.get("files"), list)):
        raise ComparisonError(f"{card_file} is of another version of cnnopt: quantize the run again")
    return Run(path.resolve().name, identity, metrics, finished, card)


def training_rows(runs: Sequence[Run]) -> list[list[str]]:
    """One row per run: its last epoch, and the settings that differ from those of the first run."""
    rows = []
    for run in runs:
        last = run.metrics[-1] if run.metrics else None
        own = [
            f"--{name.replace('_', '-')} {value}"
            for name, value in run.identity.items()
            if runs[0].identity.get(name) != value
        ]
        done = f"{last['epoch'] if last else 0} of {run.identity.get('epochs', '?')}"
        rows.append(
            [
                run.name,
                done if not run.finished else str(run.identity.get("epochs", "?")),
                f"{100 * last['val_accuracy']:.2f}" if last else "",
                f"{100 * last['sparsity']:.2f}" if last else "",
                f"{statistics.median(line['images_per_second'] for line in run.metrics):.0f}" if last else "",
                f"{minutes(run.metrics):.1f}" if last else "",
                " ".join(own) or "-",
            ]
        )
    return rows


def file_rows(runs: Sequence[Run]) -> list[list[str]]:
    """One row for each compared file of each run that ``cnnopt.quantize`` has measured."""
    return [
        [
            run.name,
            entry["name"],
            f"{100 * entry['test']['accuracy']:.2f}",
            f"{entry['size']['gzip'] / 1024:.1f}",
            f"{entry['packed']['bytes'] / 1024:.1f}" if entry["packed"] else "",
            f"{page.smallest(entry)[1]:.2f}x",
            f"{entry['latency'][0]['median_ms']:.2f}",
        ]
        for run in runs
        for entry in (run.card["files"] if run.card else [])
        if entry["name"] in COMPARED
    ]


def markdown(runs: Sequence[Run]) -> str:
    """The text of comparison.md."""
    lines = [
        f"# {', '.join(run.name for run in runs)}",
        "",
        f"`test %` is of the last epoch. The settings are those in which a run differs from {runs[0].name}.",
        "",
        *_table(COLUMNS, training_rows(runs)),
    ]
    if rows := file_rows(runs):
        lines += [
            "",
            "Files as `cnnopt.quantize` has measured them. `smaller`: packed, or through gzip -9, against the float32 "
            "reference of that run's report as it is.",
            "",
            *_table(FILE_COLUMNS, rows),
        ]
    return "\n".join([*lines, "", "![accuracy by epoch, accuracy against size](comparison.png)", ""])


def _table(columns: Sequence[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


def png(runs: Sequence[Run]) -> bytes:
    """comparison.png: accuracy by epoch and, if files were measured, accuracy against compressed size."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Ignore the settings of the user's matplotlibrc.
    matplotlib.rcdefaults()
    measured = any(run.card for run in runs)
    figure = Figure(figsize=(13 if measured else 7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    curves, *others = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    for number, run in enumerate(runs):
        epochs = [line["epoch"] for line in run.metrics]
        curves.plot(epochs, [100 * line["val_accuracy"] for line in run.metrics], color=f"C{number}", label=run.name)
        if run.card:
            entries = [entry for entry in run.card["files"] if entry["name"] in COMPARED]
            points = [(page.smallest(entry)[0] / 1024, 100 * entry["test"]["accuracy"]) for entry in entries]
            others[0].plot(*zip(*points, strict=True), "o", color=f"C{number}", label=run.name)
            for entry, point in zip(entries, points, strict=True):
                others[0].annotate(entry["name"], point, fontsize="x-small", xytext=(4, 3), textcoords="offset points")
    curves.set(xlabel="epoch", ylabel="test accuracy, %")
    for sizes in others:
        sizes.set(xscale="log", xlabel="KiB, packed or gzip -9", ylabel="test accuracy, %")
    for axes in (curves, *others):
        axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    return image.getvalue()


def show(runs: Sequence[Run]) -> None:
    """Print the tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # force_terminal overrides $FORCE_COLOR, which would write a terminal's control codes into a log.
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False, markup=False)
    for columns, rows in ((COLUMNS, training_rows(runs)), (FILE_COLUMNS, file_rows(runs))):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        if rows:
            console.print(table)


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="python -m cnnopt.compare", description=__doc__)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, the one to compare with first")
    made.add_argument("--output", type=Path, metavar="DIR", help="where comparison.md, .png and .html go")
    return made


@one_line("cnnopt.compare")
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Every expected failure prints one line and gives an exit status."""
    given = parser().parse_args(argv)
    runs = [read(path) for path in given.runs]
    show(runs)
    if given.output:
        try:
            given.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ComparisonError(f"--output {given.output}: {error.strerror}; name another folder") from None
        atomic_files.replace(given.output / "comparison.md", markdown(runs))
        atomic_files.replace(given.output / "comparison.png", png(runs))
        atomic_files.replace(given.output / "comparison.html", page.comparison_page(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
