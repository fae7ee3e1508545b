#!/usr/bin/env python
"""Write the tables of results that README.md and docs/study.md show, from the records in docs/results/study.

    python scripts/fill_tables.py            # writes them
    python scripts/fill_tables.py --check    # only names the files that differ, with status 1

Everything else in the two files stays as it is. docs/results/study/README.md is written whole.
"""

import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cnnopt.grid import records, report, tables  # noqa: E402
from cnnopt.grid.table import Table  # noqa: E402

RECORDS = ROOT / "docs" / "results" / "study"
#: The cells of our recipe in the README's table.
CELLS = ("super-60", "super-70", "super-90", "super-dense")
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
HEAD = (
    "| network, data | zero weights | accuracy % (seeds) | epochs; minutes a run | packed int8 "
    "| packed int8, 16 clusters |"
)
#: The part of docs/study.md that is written here.
BEGIN, END = "<!-- from docs/results/study: scripts/fill_tables.py -->", "<!-- end -->"


def rounded(value: float) -> int:
    """To the nearest whole number, halves up."""
    return math.floor(value + 0.5)


def packed(record: records.Record, name: str) -> str:
    """Packed size of a file, its ratio to the raw float32 file, and its accuracy. Empty if it was not measured."""
    files = {entry["name"]: entry for entry in record["files"]}
    if name not in files or not files[name]["packed"]:
        return ""
    size, whole = files[name]["packed"], files["float32"]["raw"]
    return f"{rounded(size / 1024)} KiB, {whole / size:.1f}x smaller, {100 * files[name]['accuracy']:.2f}%"


def row(group: tables.Group, label: str) -> str:
    """A row of the README's table: the runs of a cell. The files are of its first seed."""
    runs = group.of(label)
    first = runs[0]
    zeros, cores = first["identity"]["sparsity"], first["machine"]["cores"]
    accuracies = ", ".join(f"{tables.accuracy_of(run):.2f}" for run in runs)
    seeds = ", ".join(str(run["identity"]["seed"]) for run in runs)
    took = sorted({rounded(run["result"]["minutes"]) for run in runs})
    minutes = " to ".join(map(str, dict.fromkeys((took[0], took[-1]))))
    cells = (
        f"ResNet-{group.depth}, {DATA.get(group.dataset, group.dataset)}",
        f"{zeros:.0%}" if zeros else "none",
        f"{accuracies} ({seeds})",
        f"{group.epochs}; {minutes} on {cores} core{'s' * (cores > 1)}",
        packed(first, "int8"),
        packed(first, "clustered-int8"),
    )
    return "| " + " | ".join(cells) + " |"


def readme(text: str, groups: list[tables.Group]) -> str:
    """README.md with its table of results."""
    ours = sorted((group for group in groups if group.recipe == "ours"), key=lambda g: (g.dataset, -g.depth))
    rows = [row(group, label) for group in ours for label in CELLS if label in group.labels]
    table = "\n".join([HEAD, "|" + "---|" * (HEAD.count("|") - 1), *rows])
    filled, count = re.subn(rf"^{re.escape(HEAD)}\n(\|.*\n)+", lambda _: table + "\n", text, flags=re.M)
    assert count == 1, "README.md has no table of results"
    return filled


def short(table: Table) -> str:
    """A table as it stands in docs/study.md: its title as a heading, and its note."""
    return f"### {table.title}\n\n{table.markdown()}\n\n{table.note}"


def study(text: str, groups: list[tables.Group]) -> str:
    """docs/study.md with what has been run, and the answers."""
    lines = [f"- **{' '.join(map(str, group.where[:3]))}, {group.where[3]} epochs**: {ran(group)}" for group in groups]
    parts = ["\n".join(lines) or "No cell of the grid has been run yet: every table would be empty."]
    answers = tables.questions(groups)
    if answers.rows:
        parts.append(short(answers))
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:begin]}\n\n" + "\n\n".join(parts) + f"\n\n{text[end:]}"


def ran(group: tables.Group) -> str:
    """The cells of a group that have records, with the number of their seeds."""
    cells = group.grid.cells if group.grid else {}
    runs = ", ".join(f"{label} ({len(group.of(label))})" for label in group.labels)
    return f"{len(group.labels)} of {len(cells)} cells, with the number of seeds: {runs}."


def all_tables(groups: list[tables.Group]) -> str:
    """docs/results/study/README.md."""
    head = "# Records of the study\n\nOne file a cell; `python scripts/fill_tables.py` writes this page from them."
    parts = [short(table) for table in tables.tables(groups)] or ["No cell of the grid has been run yet."]
    return "\n\n".join([head, *parts]) + "\n"


def main() -> int:
    """Write the files, or compare them."""
    groups = tables.groups(records.load(RECORDS), report.known())
    pages = {
        ROOT / "README.md": lambda text: readme(text, groups),
        ROOT / "docs" / "study.md": lambda text: study(text, groups),
        RECORDS / "README.md": lambda text: all_tables(groups),
    }
    stale = []
    for path, fill in pages.items():
        before = path.read_text() if path.exists() else ""
        after = fill(before)
        if after != before:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(after)
    if "--check" in sys.argv[1:]:
        for name in stale:
            print(f"{name} differs from docs/results: python scripts/fill_tables.py", file=sys.stderr)
        return bool(stale)
    print(*stale or ["nothing to change"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
