"""The tables of a study, from its records, beside the figures of the original study (``published.yaml``)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cnnopt.grid.cells import HERE, Grid, settings_of
from cnnopt.grid.records import Record
from cnnopt.grid.table import Column, Table
from cnnopt.groups import Spread

#: The strictly pruned model of the original study: 60% zeros and no augmentation.
STRICT = "polynomial-60"
#: Cells that differ in their sparsity alone, by family.
FAMILIES = {
    "pruned": ("baseline", "polynomial-60", "polynomial-90"),
    "super": ("super-dense", "super-60", "super-70", "super-90"),
}
#: Pairs that differ in their precision alone, float32 first.
PRECISIONS = (("baseline", "mixed"), ("super-60-float32", "super-60"))
WHERE = (Column("recipe"), Column("data set"), Column("network"), Column("epochs", "d"))


@dataclass(frozen=True)
class Group:
    """The records of one recipe, data set, depth and length, and the grid that they are of, if it is known."""

    recipe: str
    dataset: str
    depth: int
    epochs: int
    grid: Grid | None
    records: list[Record] = field(default_factory=list)

    @property
    def where(self) -> tuple[str, str, str, int]:
        """The cells of the columns ``WHERE``."""
        return self.recipe, self.dataset, f"ResNet-{self.depth}", self.epochs

    @property
    def labels(self) -> list[str]:
        """The cells that have records, in the order of the grid."""
        known = list(self.grid.cells) if self.grid else []
        there = {record["cell"] for record in self.records}
        return [*(label for label in known if label in there), *sorted(there - set(known))]

    def of(self, label: str) -> list[Record]:
        """The records of a cell, by seed.

        A study on one rank leaves out cells that only differ in their ranks from another. They are that other then.
        """
        found = [record for record in self.records if record["cell"] == label]
        if not found and self.grid and label in self.grid.cells and all(r["ranks"] == 1 for r in self.records):
            same = settings_of(self.grid, label, self.dataset, self.depth, self.epochs)
            found = [record for record in self.records if {**record["identity"], "seed": 0} == same]
        return sorted(found, key=lambda record: record["identity"]["seed"])

    def spread(self, label: str, value: Callable[[Record], float | None]) -> Spread | None:
        """Mean and deviation of ``value`` over the seeds of a cell."""
        return Spread.of([found for record in self.of(label) if (found := value(record)) is not None])

    def paired(
        self, before: str, after: str, value: Callable[[Record], float | None], combine: Callable[[float, float], float]
    ) -> Spread | None:
        """``combine(value of before, value of after)`` over the seeds that both cells have. None for the same runs."""
        first = {record["identity"]["seed"]: record for record in self.of(before)}
        results = []
        for record in self.of(after):
            other = first.get(record["identity"]["seed"])
            if other is None or other["name"] == record["name"]:
                continue
            values = value(other), value(record)
            if values[0] and values[1] is not None:
                results.append(combine(values[0], values[1]))
        return Spread.of(results)


def groups(records: Iterable[Record], grids: Sequence[Grid]) -> list[Group]:
    """The records by group: the original recipe first, then by data set, depth and length."""
    by_name = {grid.recipe: grid for grid in grids}
    order = list(by_name)
    found: dict[tuple[str, str, int, int], Group] = {}
    for record in records:
        identity = record["identity"]
        key = record["recipe"], identity["dataset"], identity["depth"], identity["epochs"]
        found.setdefault(key, Group(*key, by_name.get(record["recipe"]))).records.append(record)
    return [found[key] for key in sorted(found, key=lambda k: (order.index(k[0]) if k[0] in order else len(order), *k))]


@functools.cache
def published() -> Mapping[str, Any]:
    """The figures of the original study."""
    import yaml

    return yaml.safe_load((HERE / "published.yaml").read_text())


def original(kind: str, group: Group, label: str) -> Any:
    """What the original study has for a cell, or None. It knows CIFAR-100 alone."""
    if group.dataset != published()["dataset"]:
        return None
    return published()[kind].get(group.depth, {}).get(label)


def accuracy_of(record: Record) -> float:
    """Test accuracy after the last epoch, in percent."""
    return 100 * record["result"]["accuracy"]


def file_of(name: str, key: str, times: int = 1) -> Callable[[Record], float | None]:
    """A reader of one figure of one file, ``times`` a number. The reader gives None if there is no such figure."""

    def read(record: Record) -> float | None:
        value = next((entry[key] for entry in record["files"] if entry["name"] == name), None)
        return None if value is None else value * times

    return read


def accuracy(found: Sequence[Group]) -> Table:
    """Accuracy of each cell, and its ratio to the strictly pruned model."""
    rows = []
    for group in found:
        strict = original("accuracy", group, STRICT)
        for label in group.labels:
            theirs = original("accuracy", group, label)
            ratio = group.paired(STRICT, label, accuracy_of, lambda a, b: b / a)
            zeros = group.spread(label, lambda record: 100 * record["result"]["sparsity"])
            rows.append(
                (*group.where, label, theirs, group.spread(label, accuracy_of), theirs and theirs / strict, ratio,
                 zeros and zeros.mean, len(group.of(label)))
            )  # fmt: skip
    columns = (
        *WHERE, Column("cell"), Column("original %", ".1f"), Column("ours %", ".2f", spread=True),
        Column(f"original / its {STRICT}", ".2f"), Column(f"ours / our {STRICT}", ".2f", spread=True),
        Column("zeros %", ".1f"), Column("seeds", "d"),
    )  # fmt: skip
    note = (
        f"Top-1 on the test images after the last epoch. The original trained for {published()['epochs']} epochs. "
        "Mean ± standard deviation over the seeds."
    )
    return Table("accuracy", "Accuracy", note, columns, rows)


def questions(found: Sequence[Group]) -> Table:
    """The questions of the grids, answered by pairs of cells that differ in one thing."""
    rows = [
        (*group.where, question.ask, before, after, group.spread(before, accuracy_of),
         group.spread(after, accuracy_of), difference, difference.count)
        for group in found
        for question in (group.grid.questions if group.grid else ())
        for before, after in question.pairs
        if (difference := group.paired(before, after, accuracy_of, lambda a, b: b - a)) is not None
    ]  # fmt: skip
    columns = (
        *WHERE, Column("question"), Column("from"), Column("to"), Column("from %", ".2f", spread=True),
        Column("to %", ".2f", spread=True), Column("points", "+.2f", spread=True), Column("seeds", "d"),
    )  # fmt: skip
    note = "Each pair differs in what its question asks about. Points: the difference of runs with the same seed."
    return Table("questions", "One thing at a time", note, columns, rows)


def sizes(found: Sequence[Group]) -> Table:
    """Bytes of the exported files through gzip -9, and their ratio to the float32 file of the same run."""
    rows: list[tuple[Any, ...]] = []
    for group in found:
        for label in group.labels:
            theirs = original("gzip", group, label) or {}
            names = list(dict.fromkeys(entry["name"] for record in group.of(label) for entry in record["files"]))
            for name in names:
                gzip = group.spread(label, file_of(name, "gzip"))
                accurate = group.spread(label, file_of(name, "accuracy", times=100))
                packed = group.spread(label, file_of(name, "packed"))
                rows.append(
                    (*group.where, label, name, theirs.get(name), None, gzip, _ratio(group, label, name),
                     packed and packed.mean, accurate)
                )  # fmt: skip
            if names and theirs:
                ratio = theirs["float32"] / theirs["quantized"]
                rows.append((*group.where, label, "quantized", theirs["quantized"], ratio, *[None] * 4))
    columns = (
        *WHERE, Column("cell"), Column("file"), Column("original bytes", ",d"), Column("original ratio", ".2f", "x"),
        Column("our bytes", ",.0f", spread=True), Column("our ratio", ".2f", "x", spread=True),
        Column("packed bytes", ",.0f"), Column("top-1 %", ".2f", spread=True),
    )  # fmt: skip
    note = (
        "Bytes through gzip -9. Ratio: the bytes of the float32 file of the same run, over those of this one. "
        "`quantized` is the only other file of the original, which does not say how it was made."
    )
    return Table("sizes", "Files", note, columns, rows)


def _ratio(group: Group, label: str, name: str) -> Spread | None:
    ratios = []
    for record in group.of(label):
        whole, part = file_of("float32", "gzip")(record), file_of(name, "gzip")(record)
        if whole and part:
            ratios.append(whole / part)
    return Spread.of(ratios)


def speed(found: Sequence[Group]) -> Table:
    """Minutes and images per second of each cell, and the speed-up by precision where a GPU has measured it."""
    rows = []
    for group in found:
        for label in group.labels:
            wide = next((wide for wide, mixed in PRECISIONS if mixed == label), None)
            theirs, slower = original("seconds", group, label), wide and original("seconds", group, wide)
            on_gpu = all(r["device"] == "GPU" for name in (label, wide) if name for r in group.of(name))
            first = group.of(label)[0]
            gain = group.paired(wide, label, _rate, lambda a, b: b / a) if wide and on_gpu else None
            rows.append(
                (*group.where, label, first["precision"], first["ranks"], first["device"] or "CPU",
                 first["machine"]["cpu"], theirs and theirs / 60, group.spread(label, _minutes),
                 group.spread(label, _rate), theirs and slower and slower / theirs, gain)
            )  # fmt: skip
    columns = (
        *WHERE, Column("cell"), Column("precision"), Column("ranks", "d"), Column("device"), Column("processor"),
        Column("original min", ".1f"), Column("our min", ".1f", spread=True), Column("images/s", ".0f", spread=True),
        Column("original speed-up", ".2f", "x"), Column("our speed-up", ".2f", "x", spread=True),
    )  # fmt: skip
    note = (
        f"Minutes of training. The original's are for {published()['epochs']} epochs on a T4. Speed-up: images per "
        "second against the same cell in float32. Ours is given for GPUs alone."
    )
    return Table("speed", "Time", note, columns, rows)


def _minutes(record: Record) -> float:
    return record["result"]["minutes"]


def _rate(record: Record) -> float:
    return record["result"]["images_per_second"]


def sparsity(found: Sequence[Group]) -> Table:
    """Accuracy by sparsity, for cells that differ in nothing else."""
    rows = []
    for group in found:
        for family, labels in FAMILIES.items():
            for label in labels:
                ours = group.spread(label, accuracy_of)
                if ours:
                    zeros = group.spread(label, lambda record: 100 * record["result"]["sparsity"])
                    theirs = original("accuracy", group, label)
                    rows.append((*group.where, family, zeros and zeros.mean, theirs, ours, ours.count))
    columns = (
        *WHERE, Column("family"), Column("zeros %", ".1f"), Column("original %", ".1f"),
        Column("ours %", ".2f", spread=True), Column("seeds", "d"),
    )  # fmt: skip
    note = "The cells of a family differ in their sparsity alone."
    return Table("sparsity", "Accuracy by sparsity", note, columns, rows)


def twins(found: Sequence[Group]) -> list[str]:
    """A line for each two files of different cells with the same bytes: one of them is listed under a wrong name.

    The original study lists such a file.
    """
    seen: dict[str, str] = {}
    lines = []
    for record in (record for group in found for record in group.records):
        for entry in record["files"]:
            name = f"{record['name']}, {entry['name']}"
            if (first := seen.setdefault(entry["sha256"], name)) != name:
                lines.append(f"Two files have equal bytes: {first}; {name}.")
    return lines


def tables(found: Sequence[Group]) -> Iterator[Table]:
    """All tables that have a row."""
    for make in (accuracy, questions, sparsity, sizes, speed):
        table = make(found)
        if table.rows:
            yield table
