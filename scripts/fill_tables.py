#!/usr/bin/env python
"""Write the tables of results that README.md and docs/study.md show, from the stored runs and records of docs/results.

    python scripts/fill_tables.py            # writes them
    python scripts/fill_tables.py --check    # only names the files that differ, with status 1

Everything else in the two files stays as it is. docs/results/study/README.md is written whole.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cnnopt.grid import records, report, tables  # noqa: E402
from cnnopt.grid.table import Table  # noqa: E402
from cnnopt.run.run_folder import RunFolder  # noqa: E402

RESULTS = ROOT / "docs" / "results"
#: The rows of the README's table: runs of one setting that differ in their seed, the one with measured files first.
ROWS = (
    ("resnet44-np2-defaults", "resnet44-np2-defaults-seed1"),
    ("resnet20-muon-decay-seed0", "resnet20-muon-decay-seed1", "resnet20-muon-decay-seed2"),
    ("resnet20-70-muon-30epochs",),
    ("resnet20-dense-muon-seed0",),
)
HEAD = (
    "| network | zero weights | accuracy % (seeds) | epochs; minutes a run | packed int8 | packed int8, 16 clusters |"
)
#: The part of docs/study.md that is written here.
BEGIN, END = "<!-- from docs/results/study: scripts/fill_tables.py -->", "<!-- end -->"


def read(run: str, name: str) -> dict[str, Any]:
    """A JSON file of a stored run; empty if the run has no such file."""
    path = RESULTS / run / name
    return json.loads(path.read_text()) if path.exists() else {}


def rounded(value: float) -> int:
    """To the nearest whole number, halves up."""
    return math.floor(value + 0.5)


def packed(report: dict[str, Any], names: tuple[str, ...]) -> str:
    """Size, ratio and accuracy of the first of these files that a report has."""
    by_name = {entry["name"]: entry for entry in report.get("files", [])}
    entry = next((by_name[name] for name in names if name in by_name), None)
    if entry is None:
        return ""
    archive = entry["packed"]
    tuned = entry["fine_tuned"]
    more = f" with {tuned['epochs']} epoch{'s' * (tuned['epochs'] > 1)} of fine-tuning" if tuned else ""
    size, accuracy = rounded(archive["bytes"] / 1024), 100 * entry["test"]["accuracy"]
    return f"{size} KiB, {archive['times_smaller']:.1f}x smaller, {accuracy:.2f}%{more}"


def row(runs: tuple[str, ...]) -> str:
    """A row of the README's table."""
    environment, card = (read(runs[0], name) for name in ("env.json", "report.json"))
    identities = [RunFolder(RESULTS / run).identity("restore it") for run in runs]
    identity = identities[0]
    results = [RunFolder(RESULTS / run).result() or {} for run in runs]
    seeds = ", ".join(str(identity["seed"]) for identity in identities)
    accuracies = ", ".join(f"{100 * result['test_accuracy']:.2f}" for result in results)
    took = sorted({rounded(result["minutes"]) for result in results})
    minutes = " to ".join(map(str, dict.fromkeys((took[0], took[-1]))))
    cores = environment["cores"]
    cells = (
        f"ResNet-{identity['depth']}",
        f"{identity['sparsity']:.0%}" if identity["sparsity"] else "none",
        f"{accuracies} ({seeds})",
        f"{identity['epochs']}; {minutes} on {cores} core{'s' * (cores > 1)}",
        packed(card, ("int8",)),
        packed(card, ("clustered-int8-qat", "clustered-int8")),
    )
    return "| " + " | ".join(cells) + " |"


def readme(text: str) -> str:
    """README.md with its table of results."""
    table = "\n".join([HEAD, "|" + "---|" * (HEAD.count("|") - 1), *map(row, ROWS)])
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
    """The cells of a group that have records, with their seeds, and those of its grid that have none."""
    there = group.labels
    runs = "; ".join(f"{label} ({len(group.of(label))})" for label in there)
    missing = [label for label in (group.grid.cells if group.grid else ()) if label not in there]
    return f"run, with the number of seeds: {runs}. Not run yet: {', '.join(missing) or 'none'}."


def all_tables(groups: list[tables.Group]) -> str:
    """docs/results/study/README.md."""
    head = "# Records of the study\n\nOne file a cell; `python scripts/fill_tables.py` writes this page from them."
    parts = [short(table) for table in tables.tables(groups)] or ["No cell of the grid has been run yet."]
    return "\n\n".join([head, *parts]) + "\n"


def main() -> int:
    """Write the files, or compare them."""
    groups = tables.groups(records.load(RESULTS / "study"), report.known())
    pages = {
        ROOT / "README.md": readme,
        ROOT / "docs" / "study.md": lambda text: study(text, groups),
        RESULTS / "study" / "README.md": lambda text: all_tables(groups),
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
