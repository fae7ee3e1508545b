"""Writes report.json, report.md and report.png of a run, and prints its table, from the measurements alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnopt.export.shipped import MEANING, shipped
from cnnopt.packages import RUNTIMES
from cnnopt.run import atomic_files

#: The version of report.json. It rises when a key changes its meaning or is removed, but not for a new key.
SCHEMA = 2
COLUMNS = (
    "file", "raw", "gzip", "xz", "bound", "packed", "smaller", "nonzero", "top-1 %", "loss", "agree %",
    "ms, 1 thread", "ms, all", "peak MiB",
)  # fmt: skip
INTERPRETERS = {"tf": "TensorFlow", "litert": "LiteRT"}
FORMAT_COLUMNS = ("format", "raw", "gzip", "smaller", "top-1 %", "difference", "runtime")
FORMATS_MEANING = "The float32 network in its own runtimes; difference: the largest to a logit in TensorFlow"


def rows(content: dict[str, Any]) -> list[list[str]]:
    """The table of a report, one row per file. Sizes are in KiB; a latency is median/p90/p99."""
    table = []
    for entry in content["files"]:
        size, test, timings = entry["size"], entry["test"], entry["latency"]
        packed = entry["packed"]
        table.append(
            [
                entry["name"],
                *(f"{size[name] / 1024:.1f}" for name in ("raw", "gzip", "xz", "entropy_bound")),
                f"{packed['bytes'] / 1024:.1f}" if packed else "",
                f"{shipped(entry).times_smaller:.2f}x",
                f"{entry['weights']['nonzero']:,}",
                f"{100 * test['accuracy']:.2f}",
                f"{test['loss']:.4f}",
                f"{100 * test['agreement']:.2f}",
                *(f"{t['median_ms']:.2f}/{t['p90_ms']:.2f}/{t['p99_ms']:.2f}" for t in (timings[0], timings[-1])),
                f"{timings[0]['peak_rss'] / 2**20:.0f} (+{timings[0]['added_rss'] / 2**20:.1f})",
            ]
        )
    return table


def format_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """The table of the other formats of a report, which may be of an earlier version. Sizes are in KiB."""
    return [
        [
            entry["name"],
            f"{entry['size']['raw'] / 1024:.1f}",
            f"{entry['size']['gzip'] / 1024:.1f}",
            f"{shipped(entry).times_smaller:.2f}x",
            f"{100 * entry['test']['accuracy']:.2f}",
            f"{entry['largest_difference']:.1g}",
            entry["runtime"],
        ]
        for entry in content.get("formats", [])
    ]


def markdown(content: dict[str, Any]) -> str:
    """The text of report.md."""
    run, machine, reference = content["run"], content["machine"], content["reference"]
    trained = f"{100 * run['trained_accuracy']:.2f}%" if run["trained_accuracy"] is not None else "not known"
    lines = [
        f"# {run['path']}",
        "",
        f"ResNet-{run['depth']} on {run['dataset']}, {run['parameters']:,} parameters, {run['sparsity']:.2%} of the "
        f"kernels' weights zero, {run['checkpoint']}. Test accuracy in training {trained}, of the float32 network "
        f"{100 * run['float32_accuracy']:.2f}%, over {content['files'][0]['test']['images']:,} images.",
        "",
        f"Sizes in KiB; `bound` is the entropy bound; `smaller`: {MEANING}. The reference is the "
        f"{'dense' if reference['kind'] == 'baseline' else 'own'} float32 file of {reference['run']} "
        f"({reference['raw']:,} bytes). `agree`: share of test images on which the file and the float32 network of the "
        "run name the same class. Latency of one image in ms, median/p90/p99. `peak MiB`: resident memory at one "
        "thread, and in brackets what the file added to it.",
        "",
        *_table(COLUMNS, rows(content)),
        "",
        f"Measured on {machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f}, {interpreter(content)}; "
        "delegate " + ", ".join(f"{e['name']}: {e['latency'][0]['delegate']}" for e in content["files"]) + ".",
        "",
        *_formats(content),
        "## What the figures say",
        "",
        *(f"- {note}" for note in content["notes"]),
        "",
        "## Zeros on the way to each file",
        "",
        "Zeros in the kernels at each stage, and in brackets the pruned weights that are not zero there.",
        "",
    ]
    for entry in content["files"]:
        if ledger := entry["ledger"]:
            way = " -> ".join(f"{s['stage']} {s['zeros']:,} ({s['lost']:,})" for s in ledger["stages"])
            lines.append(f"- {entry['name']}: {way}. First loss: {ledger['first_loss'] or 'none'}.")
    return "\n".join([*lines, "", "![accuracy, latency, layers](report.png)", ""])


def _formats(content: dict[str, Any]) -> list[str]:
    table = format_rows(content)
    if not table:
        return []
    return ["## Other formats", "", f"{FORMATS_MEANING}.", "", *_table(FORMAT_COLUMNS, table), ""]


def _table(columns: Sequence[str], table: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *table)]
    return [lines[0], "|" + "---|" * len(columns), *lines[1:]]


def interpreter(content: dict[str, Any]) -> str:
    """The package whose interpreter has measured the files of a report, and its version."""
    runtime = content.get("runtime", "tf")
    return f"{INTERPRETERS[runtime]} {content['machine']['packages'][RUNTIMES[runtime]]}"


def save(content: dict[str, Any], folder: Path) -> None:
    """Write report.json, report.md and report.png into ``folder``. Raises WriteError."""
    from cnnopt.export import figure

    atomic_files.replace(folder / "report.json", json.dumps(content, indent=1) + "\n")
    atomic_files.replace(folder / "report.md", markdown(content))
    atomic_files.replace(folder / "report.png", figure.png(content))


def show(content: dict[str, Any]) -> None:
    """Print the table and the notes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # force_terminal overrides $FORCE_COLOR, which would write a terminal's control codes into a log.
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False, markup=False, soft_wrap=True)
    # These columns fit into 80 characters. report.md has all columns.
    columns = ("raw", "gzip", "bound", "packed", "smaller", "top-1", "agree", "ms")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("file", *columns):
        table.add_column(column, justify="left" if column == "file" else "right", no_wrap=True)
    for row in rows(content):
        cells = dict(zip(COLUMNS, row, strict=True))
        names = ("file", "raw", "gzip", "bound", "packed", "smaller", "top-1 %", "agree %")
        table.add_row(*(cells[name] for name in names), cells["ms, 1 thread"].split("/")[0])
    console.print(f"smaller: {MEANING}")
    console.print("sizes in KiB; top-1, agree: %; ms: median latency of one image at 1 thread")
    console.print(table)
    if others := format_rows(content):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for column in FORMAT_COLUMNS:
            table.add_column(column, overflow="fold")
        for row in others:
            table.add_row(*row)
        console.print(table)
    for note in content["notes"]:
        console.print(note)
    console.print(f"{content['run']['path']}/report.json, report.md, report.png, report.html")
