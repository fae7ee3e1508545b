"""How far the cells of a study are, and how long the rest takes. Reads only the run folders."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Sequence

from cnnopt.errors import CnnoptError
from cnnopt.export.options import PACKED
from cnnopt.export.render import SCHEMA
from cnnopt.grid.cells import Cell
from cnnopt.run import atomic_files
from cnnopt.run.run_folder import RunFolder, minutes

#: The values a kernel has in the clustered files of a study.
CLUSTERS = 16
#: The states of a cell, in order.
WAITING, BEGUN, TRAINED, DONE = "waiting", "begun", "trained", "done"


def state(cell: Cell, variants: Sequence[str]) -> str:
    """How far a cell is. It is done once ``variants`` of its last step are measured.

    Raises UserError if the folder holds another run, or is damaged.
    """
    folder = RunFolder(cell.folder)
    folder.check(cell.config)
    if not folder.is_run:
        return WAITING
    result = folder.result()
    if result is None:
        return BEGUN
    return DONE if set(variants) <= set(measured(cell, result["step"])) else TRAINED


def measured(cell: Cell, step: int) -> list[str]:
    """The variants that the report of a cell's run holds, if the report is of ``step``. None of a damaged report.

    A file that a user made with another number of clusters, or without its archive, does not count.
    """
    try:
        card = atomic_files.read_json(cell.folder / "report.json", "")
    except atomic_files.ReadError:
        return []
    if card.get("schema") != SCHEMA or card.get("run", {}).get("step") != step:
        return []
    return [
        entry["name"]
        for entry in card["files"]
        if (entry["name"] not in PACKED or entry["packed"])
        and (not entry["name"].startswith("clustered-") or card["run"]["clusters"] == CLUSTERS)
    ]


def epochs_done(cell: Cell) -> int:
    """The epochs that a cell has recorded."""
    metrics = RunFolder(cell.folder).metrics()
    return metrics[-1]["epoch"] if metrics else 0


class Pace:
    """The time that cells take, from the epochs that they have recorded, and what starting and measuring add to it."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self.rates: dict[str, float] = {}
        self.overheads: list[float] = []
        self.cells = list(cells)
        for cell in self.cells:
            # A damaged cell is reported when its turn comes.
            with contextlib.suppress(CnnoptError):
                self.see(cell)

    def see(self, cell: Cell) -> None:
        """Take in what a cell has recorded."""
        metrics = RunFolder(cell.folder).metrics()
        if metrics:
            self.rates[cell.name] = minutes(metrics) / (metrics[-1]["epoch"] * _work(cell))

    def ended(self, cell: Cell, trained: float, elapsed: float) -> None:
        """A cell has ended ``elapsed`` minutes after its start, in which it ``trained`` for some."""
        self.see(cell)
        self.overheads.append(max(0.0, elapsed - trained))

    def left(self, cells: Iterable[Cell]) -> float | None:
        """Minutes that ``cells`` still take, one after the other. None before any epoch was recorded."""
        if not self.rates:
            return None
        kinds: dict[tuple[int, bool], list[float]] = {}
        for cell in self.cells:
            if cell.name in self.rates:
                kinds.setdefault(_kind(cell), []).append(self.rates[cell.name])
        overhead = statistics.mean(self.overheads) if self.overheads else 0.0
        total = 0.0
        for cell in cells:
            rate = statistics.mean(kinds.get(_kind(cell), list(self.rates.values())))
            total += rate * _work(cell) * (cell.config.epochs - epochs_done(cell)) + overhead
        return total


def _work(cell: Cell) -> float:
    """The work of an epoch, in a unit that is the same for all cells: images times layers."""
    from cnnopt.data.datasets import DATASETS

    return DATASETS[cell.config.dataset] * cell.config.depth


def _kind(cell: Cell) -> tuple[int, bool]:
    """Cells that need as long for the same work."""
    return cell.ranks, cell.config.precision == "float32"


def spoken(time: float | None) -> str:
    """Minutes as text."""
    if time is None:
        return "not known yet"
    if time < 1:
        return "under a minute"
    hours, rest = divmod(round(time), 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"
