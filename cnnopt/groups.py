"""Runs as their folders hold them, in groups that differ in the seed only. Reads JSON only."""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnopt.errors import UserError
from cnnopt.export.render import SCHEMA
from cnnopt.run import atomic_files
from cnnopt.run.run_folder import RunFolder


class GroupError(UserError):
    """A folder that cannot be read as a run. The message is one line that names it and the remedy."""


@dataclass(frozen=True)
class Run:
    """The content of a run folder. ``result`` is its result.json and ``card`` its report.json; each may be None.

    ``computed``: on how many ranks, on which kind of device and in which precision it was trained, as far as known.
    """

    name: str
    identity: dict[str, Any]
    computed: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any] | None
    card: dict[str, Any] | None

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.identity["seed"]

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self.result is not None

    @property
    def last(self) -> dict[str, Any]:
        """The metrics of the last epoch; empty before the first has ended."""
        return self.metrics[-1] if self.metrics else {}

    def test_accuracy(self) -> float | None:
        """In percent, after the last epoch. None before the test images are evaluated."""
        return self._accuracy("test_accuracy")

    def validation_accuracy(self) -> float | None:
        """In percent, after the last epoch. None for a run without validation images."""
        return self._accuracy("val_accuracy")

    def _accuracy(self, name: str) -> float | None:
        known = {**self.last, **(self.result or {})}
        return 100 * known[name] if name in known else None


@dataclass(frozen=True)
class Spread:
    """The mean of some values and their sample standard deviation, which one value does not have."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of the values that are not None. None if there are none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))

    def text(self, digits: int, unit: str = "") -> str:
        """Such as ``91.26% ±0.34``, with the unit ``%``."""
        deviation = "" if self.deviation is None else f" ±{self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{unit}{deviation}"


@dataclass(frozen=True)
class Group:
    """Complete runs that differ in the seed only, or one run that is not complete."""

    name: str
    runs: tuple[Run, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that all runs of the group share."""
        return {name: value for name, value in self.runs[0].identity.items() if name != "seed"}

    def spread(self, value: Callable[[Run], float | None]) -> Spread | None:
        """Mean and deviation over the runs for which ``value`` is known."""
        return Spread.of(map(value, self.runs))


def read(path: Path) -> Run:
    """A run, finished or not. Raises UserError."""
    folder = RunFolder(path)
    identity = folder.identity("name folders that train_hvd.py made")
    metrics, result = folder.metrics(), folder.result()
    card_file = path / "report.json"
    card = atomic_files.read_json(card_file, "quantize the run again") if card_file.exists() else None
    if card is not None and (card.get("schema") != SCHEMA or not isinstance(card.get("files"), list)):
        raise GroupError(f"{card_file} is of another version of cnnopt: quantize the run again")
    environment = path / "env.json"
    stored = atomic_files.read_json(environment, "restore it, or delete it") if environment.exists() else {}
    computed: dict[str, Any] = {name: stored[name] for name in ("ranks", "device", "precision") if name in stored}
    return Run(path.resolve().name, identity, computed, metrics, result, card)


def find(paths: Sequence[Path]) -> list[Path]:
    """The run folders among ``paths`` and directly in them, each once. Raises UserError for a path without any."""
    found: dict[Path, Path] = {}
    for path in paths:
        folders = [path]
        if os.path.isdir(path) and not RunFolder(path).is_run:
            try:
                folders = sorted(entry for entry in path.iterdir() if RunFolder(entry).is_run)
            except OSError as error:
                raise GroupError(f"{path}: {error.strerror}; name a folder that may be read") from None
            if not folders:
                raise GroupError(f"{path}: neither a run folder nor a folder of some; name one that train_hvd.py made")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def by_settings(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs. Their names differ."""
    members: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        settings = [{**run.identity, "seed": None}, run.computed, None if run.finished else number]
        key = json.dumps(settings, sort_keys=True)
        # A second run with the same seed is the same experiment, and says nothing of the spread.
        while run.seed in [other.seed for other in members.get(key, [])]:
            key += " again"
        members.setdefault(key, []).append(run)
    groups: list[Group] = []
    for some in members.values():
        name = some[0].name
        if len(some) > 1:
            name = re.sub(rf"[-_.]?seed{some[0].seed}$", "", name) or name
        taken = {group.name for group in groups}
        name = name if name not in taken else some[0].name
        # Runs in different folders may have one name.
        again = itertools.count(2)
        whole = name
        while name in taken:
            name = f"{whole} ({next(again)})"
        groups.append(Group(name, tuple(some)))
    return groups
