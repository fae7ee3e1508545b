"""The cells of a study: a YAML file, expanded over data sets, depths and seeds to runs of ``train_hvd.py``.

``original.yaml`` and ``ours.yaml`` in this folder are such files; ``original.yaml`` says what the keys mean.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnopt.command_line import nearest
from cnnopt.config import TrainConfig, parse_args
from cnnopt.errors import UserError
from cnnopt.schedules import Duration, parse_drops, parse_duration

HERE = Path(__file__).parent
#: The grids that come with the program. ``--recipe`` names one of them.
RECIPES = ("original", "ours")
NAME = re.compile(
    r"(?P<recipe>[a-z0-9+._-]+?)-(?P<dataset>cifar100?|digits|synthetic)-resnet(?P<depth>\d+)-(?P<label>[a-z0-9+._-]+)"
    r"-(?P<epochs>\d+)epochs-seed(?P<seed>\d+)"
)
LABEL = re.compile(r"[a-z0-9][a-z0-9+._-]*")
#: The keys of a grid file.
KEYS = ("epochs", "datasets", "depths", "seeds", "cells", "questions")
#: What a study decides for each cell. A grid file cannot.
DECIDED = {"dataset", "data_dir", "depth", "epochs", "seed", "run_dir", "name", "expect_ranks", "resume", "quantize"}
#: Flags that do not train.
ASKING = {"help", "version"}


class GridError(UserError):
    """A grid, or a choice from it, is wrong. The message is one line that names the file or flag and the remedy."""


@dataclass(frozen=True)
class Question:
    """A question, and the pairs of cells that answer it. The two of a pair differ in one thing."""

    ask: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Grid:
    """A grid file. ``epochs``: by the smallest depth for which they hold. ``cells``: the settings of each, by label."""

    recipe: str
    epochs: Mapping[int, int]
    datasets: tuple[str, ...]
    depths: tuple[int, ...]
    seeds: tuple[int, ...]
    cells: Mapping[str, Mapping[str, Any]]
    questions: tuple[Question, ...]

    def full_epochs(self, depth: int) -> int:
        """The epochs of a network of this depth at ``--scale 1``."""
        fitting = [least for least in self.epochs if least <= depth]
        return self.epochs[max(fitting, default=min(self.epochs))]


@dataclass(frozen=True)
class Cell:
    """One run of a study. ``flags`` are those of ``train_hvd.py``, and ``config`` is what they say."""

    recipe: str
    label: str
    ranks: int
    flags: tuple[str, ...]
    config: TrainConfig

    @property
    def name(self) -> str:
        """The name of the run folder. ``NAME`` reads it."""
        assert self.config.name is not None
        return self.config.name

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run_dir) / self.name


def read(path: Path) -> Grid:
    """Read a grid file. Raises GridError."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise GridError(f"{path}: {error.strerror}; name a YAML file such as {HERE / 'original.yaml'}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GridError(f"{path} is not YAML: {error}") from None

    def refuse(what: str) -> GridError:
        return GridError(f"{path}: {what}; see {HERE / 'original.yaml'}")

    if not isinstance(content, dict) or not LABEL.fullmatch(path.stem):
        raise refuse("a grid has the keys " + ", ".join(KEYS) + ", and a file name in small letters")
    for key in content:
        if key not in KEYS:
            raise refuse(f"{key}: not a key of a grid: {nearest(str(key), KEYS) or ', '.join(KEYS)}")
    for key in KEYS[:-1]:
        if not content.get(key):
            raise refuse(f"{key} is missing")
    epochs = content["epochs"] if isinstance(content["epochs"], dict) else {0: content["epochs"]}
    if not all(type(depth) is int and type(number) is int and number > 0 for depth, number in epochs.items()):
        raise refuse("epochs: give a whole number, or one for each smallest depth")
    for key, kind in (("datasets", str), ("depths", int), ("seeds", int)):
        if not isinstance(content[key], list) or not all(type(value) is kind for value in content[key]):
            raise refuse(f"{key}: give a list, such as [{'cifar10' if kind is str else '20'}]")
    cells = content["cells"]
    if not isinstance(cells, dict) or not all(isinstance(settings, dict) for settings in cells.values()):
        raise refuse("cells: give a name and the settings of each")
    for label, settings in cells.items():
        if not isinstance(label, str) or not LABEL.fullmatch(label):
            raise refuse(f"cells: {label}: use small letters, digits and '-'")
        for setting in settings:
            if not isinstance(setting, str) or setting.replace("-", "_") in DECIDED | ASKING:
                raise refuse(f"cells: {label}: {setting} is not a setting of a cell")
        if settings.get("ranks", "all") != "all":
            raise refuse(f"cells: {label}: ranks: {settings['ranks']}: give all, or leave it out")
    questions = []
    asked = content.get("questions") or []
    if not isinstance(asked, list):
        raise refuse("questions: give a list; each has the keys ask and compare")
    for question in asked:
        pairs = question.get("compare") if isinstance(question, dict) else None
        if not isinstance(pairs, list) or not isinstance(question.get("ask"), str):
            raise refuse("questions: each has the keys ask and compare")
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2:
                raise refuse(f"questions: {question['ask']}: compare pairs of cells")
            for label in pair:
                if not isinstance(label, str) or label not in cells:
                    raise refuse(
                        f"questions: {question['ask']}: there is no cell {label}: {nearest(str(label), cells)}"
                    )
        questions.append(Question(question["ask"], tuple((a, b) for a, b in pairs)))
    datasets, depths, seeds = (tuple(content[key]) for key in ("datasets", "depths", "seeds"))
    return Grid(path.stem, epochs, datasets, depths, seeds, cells, tuple(questions))


def recipe(name: str) -> Grid:
    """A grid that comes with the program."""
    return read(HERE / f"{name}.yaml")


def expand(
    grid: Grid,
    *,
    scale: float,
    ranks: int,
    run_dir: str,
    data_dir: str | None = None,
    datasets: Sequence[str] = (),
    depths: Sequence[int] = (),
    seeds: Sequence[int] = (),
) -> list[Cell]:
    """The cells in the order in which they run. Empty ``datasets``, ``depths`` and ``seeds`` are those of the grid.

    The first seed of everything comes first, and in it the smallest network. So a part of the grid is useful. A cell
    that is the same run as an earlier one is left out: ``distributed``, if there is only one rank. Raises UserError.
    """
    cells: list[Cell] = []
    seen = set()
    for seed in seeds or grid.seeds:
        for depth in depths or grid.depths:
            for dataset in datasets or grid.datasets:
                for label in grid.cells:
                    cell = _cell(grid, label, dataset, depth, seed, scale, ranks, run_dir, data_dir)
                    what = (cell.ranks, *map(str, cell.config.identity().values()))
                    if what not in seen:
                        seen.add(what)
                        cells.append(cell)
    return cells


def choose(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose label or name fits one of the shell ``patterns``; all, if there is none. Raises GridError."""
    for pattern in patterns:
        if not any(_fits(cell, pattern) for cell in cells):
            labels = list(dict.fromkeys(cell.label for cell in cells))
            raise GridError(f"--only {pattern}: {nearest(pattern, labels) or 'there are ' + ', '.join(labels)}")
    return [cell for cell in cells if not patterns or any(_fits(cell, pattern) for pattern in patterns)]


def _fits(cell: Cell, pattern: str) -> bool:
    return fnmatch.fnmatchcase(cell.label, pattern) or fnmatch.fnmatchcase(cell.name, pattern)


def _cell(
    grid: Grid,
    label: str,
    dataset: str,
    depth: int,
    seed: int,
    scale: float,
    ranks: int,
    run_dir: str,
    data_dir: str | None,
) -> Cell:
    settings = dict(grid.cells[label])
    ranks = ranks if settings.pop("ranks", None) else 1
    full = grid.full_epochs(depth)
    epochs = max(1, round(scale * full))
    flags = []
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        flags += [f"--no-{flag[2:]}" if value is False else flag] if isinstance(value, bool) else [flag, str(value)]
    flags += ["--dataset", dataset, "--depth", str(depth), "--epochs", str(epochs), "--seed", str(seed)]
    try:
        for key, value in shortened(parse_args(flags), epochs / full).items():
            flags += [f"--{key.replace('_', '-')}", value]
        name = f"{grid.recipe}-{dataset}-resnet{depth}-{label}-{epochs}epochs-seed{seed}"
        flags += ["--name", name, "--run-dir", run_dir, *(["--data-dir", data_dir] if data_dir else [])]
        config = parse_args(flags)
        config.check_ranks(ranks)
    except UserError as error:
        raise GridError(f"{grid.recipe}, {label}: {error}") from None
    return Cell(grid.recipe, label, ranks, tuple(flags), config)


def settings_of(grid: Grid, label: str, dataset: str, depth: int, epochs: int) -> dict[str, Any]:
    """The ``TrainConfig.identity`` of a cell with seed 0. Raises UserError."""
    scale = epochs / grid.full_epochs(depth)
    return _cell(grid, label, dataset, depth, 0, scale, 1, "runs", None).config.identity()


def shortened(config: TrainConfig, share: float) -> dict[str, str]:
    """The durations of ``config`` in epochs and steps, made shorter by ``share``: those that change, as flags say them.

    Shares of the run follow its length by themselves. No duration in steps becomes 0.
    """

    def shorter(duration: Duration) -> str:
        if duration.unit == "e":
            return str(Duration(duration.value * share, "e"))
        if duration.unit == "s" and duration.value:
            return f"{max(1, round(duration.value * share))}s"
        return str(duration)

    texts = {name: getattr(config, name) for name in ("prune_begin", "prune_end", "prune_frequency", "warmup")}
    changed = {name: shorter(parse_duration(text)) for name, text in texts.items()}
    texts["lr_drops"] = config.lr_drops
    changed["lr_drops"] = ",".join(f"{shorter(when)}:{factor:g}" for when, factor in parse_drops(config.lr_drops))
    return {name: text for name, text in changed.items() if text != texts[name]}
