"""Writes the tables, figures, records and the page of a study, from its run folders or from stored records."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from cnnopt.export import page
from cnnopt.grid import cells, figures, records, tables
from cnnopt.grid.cells import Grid, GridError
from cnnopt.grid.table import Table
from cnnopt.groups import read
from cnnopt.run import atomic_files


def of_runs(run_dir: Path, output: Path, grids: Sequence[Grid]) -> None:
    """Write everything for all complete cells in ``run_dir``. ``grids`` are known besides those of the program.

    Raises UserError if there is no complete cell, WriteError.
    """
    found = records.of_study(run_dir)
    if not found:
        raise GridError(f"--run-dir {run_dir}: no cell is complete yet")
    groups = tables.groups(found, known(grids))
    sections = write(groups, output)
    try:
        (output / "records").mkdir(exist_ok=True)
    except OSError as error:
        raise GridError(f"--output {output}: {error.strerror}; name another folder") from None
    records.save(found, output / "records")
    runs = [read(run_dir / name) for name in firsts(groups)]
    title = f"{len(found)} runs of the study"
    atomic_files.replace(output / "study.html", page.comparison_page(runs, title=title, first=sections))


def of_records(folder: Path, output: Path, grids: Sequence[Grid]) -> None:
    """Write the tables and figures of stored records. Raises UserError, WriteError."""
    found = records.load(folder)
    if not found:
        raise GridError(f"--records {folder}: no record is there")
    write(tables.groups(found, known(grids)), output)


def write(groups: Sequence[tables.Group], output: Path) -> list[str]:
    """Write tables and figures. Returns them as the sections of a page. Raises UserError, WriteError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GridError(f"--output {output}: {error.strerror}; name another folder") from None
    made = list(tables.tables(groups))
    for table in made:
        atomic_files.replace(output / f"{table.name}.csv", table.csv())
    atomic_files.replace(output / "study.tex", "\n".join(table.latex() for table in made))
    sections = [page.section(table.title, table.html(), "wide") for table in made]
    drawn = []
    for name, title, figure in figures.figures(groups):
        drawn.append((name, title))
        svg = figures.image(figure, "svg")
        atomic_files.replace(output / f"{name}.png", figures.image(figure, "png"))
        atomic_files.replace(output / f"{name}.svg", svg)
        source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
        sections.append(page.section(title, f'<img class="figure" src="{source}" alt="{title}">', "wide"))
    atomic_files.replace(output / "study.md", markdown(made, drawn, tables.twins(groups)))
    return sections


def known(grids: Sequence[Grid] = ()) -> list[Grid]:
    """The grids of the program, and ``grids``."""
    return list({grid.recipe: grid for grid in (*map(cells.recipe, cells.RECIPES), *grids)}.values())


def firsts(groups: Sequence[tables.Group]) -> list[str]:
    """The names of one run for each cell: that of the lowest seed."""
    return [group.of(label)[0]["name"] for group in groups for label in group.labels]


def markdown(made: Sequence[Table], drawn: Sequence[tuple[str, str]], warnings: Sequence[str]) -> str:
    """The text of study.md."""
    parts = ["# The study", *warnings]
    parts += [f"## {table.title}\n\n{table.markdown()}\n\n{table.note}" for table in made]
    parts += [f"![{title}]({name}.png)" for name, title in drawn]
    return "\n\n".join(parts) + "\n"


def summary(folder: Path) -> str:
    """One line about a complete cell."""
    record = records.of_run(folder)
    assert record is not None
    result = record["result"]
    parts = [f"{100 * result['accuracy']:.2f}%", f"{100 * result['sparsity']:.1f}% zeros"]
    parts += [f"{result['minutes']:.1f} min"]
    smallest = min(record["files"], key=lambda entry: entry["packed"] or entry["gzip"], default=None)
    if smallest:
        size = (smallest["packed"] or smallest["gzip"]) / 1024
        parts.append(f"{smallest['name']} {size:.1f} KiB with {100 * smallest['accuracy']:.2f}%")
    return ", ".join(parts)
