"""The figures of a study: accuracy, accuracy by sparsity, and accuracy against size, beside the original study's."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from cnnopt.grid import tables
from cnnopt.grid.tables import Group
from cnnopt.groups import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Groups side by side.
ACROSS = 2
#: The shape of a file's dot.
MARKERS = {"float32": "s", "float16": "D", "dynamic": "v", "int8": "o", "clustered-int8": "^"}


def figures(found: Sequence[Group]) -> Iterator[tuple[str, str, Figure]]:
    """Name, title and figure of each that has something to show."""
    yield "accuracy", "Accuracy of each cell", _figure(found, _accuracy, 4.2)
    several = [group for group in found if any(len(_points(group, labels)) > 1 for labels in tables.FAMILIES.values())]
    if several:
        yield "sparsity", "Accuracy by sparsity", _figure(several, _sparsity, 3.6)
    measured = [group for group in found if any(record["files"] for record in group.records)]
    if measured:
        yield "sizes", "Accuracy against size", _figure(measured, _sizes, 4.2)
        yield "bytes", "Bytes of the files", _figure(measured, _bytes, 4.2)
    yield "speed", "Images per second", _figure(found, _speed, 4.2)


def image(figure: Figure, form: str) -> bytes:
    """A figure as ``png`` or ``svg``. The same figure always gives the same bytes."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "cnnopt"}):
        figure.savefig(content, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    return content.getvalue()


def _figure(found: Sequence[Group], draw: Callable[[Axes, Group], None], height: float) -> Figure:
    """One diagram for each group."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Ignore the settings of the user's matplotlibrc.
    matplotlib.rcdefaults()
    across = min(ACROSS, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(7 * across, height * down), layout="constrained")
    # A figure with a separate canvas needs no display and does not touch pyplot's state.
    FigureCanvasAgg(figure)
    for axes, group in zip(figure.subplots(down, across, squeeze=False).flat, found, strict=False):
        draw(axes, group)
        recipe, dataset, network, epochs = group.where
        axes.set_title(f"{network}, {dataset}, {recipe} recipe, {epochs} epochs", fontsize="medium")
    for axes in figure.axes[len(found) :]:
        axes.remove()
    return figure


def _legend(axes: Axes) -> None:
    """A legend beside the diagram, where it hides nothing."""
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))


def _bar(spread: Spread) -> float:
    """The length of an error bar. A single seed has none."""
    return math.nan if spread.deviation is None else spread.deviation


def _accuracy(axes: Axes, group: Group) -> None:
    labels = group.labels
    spreads = [group.spread(label, tables.accuracy_of) for label in labels]
    places = range(len(labels))
    axes.barh(
        places, [spread.mean for spread in spreads if spread], 0.6, color="C0", label="ours",
        xerr=[_bar(spread) for spread in spreads if spread], capsize=3,
    )  # fmt: skip
    theirs = [(place, value) for place in places if (value := tables.original("accuracy", group, labels[place]))]
    if theirs:
        axes.plot([value for _, value in theirs], [place for place, _ in theirs], "k|", ms=14, mew=2, label="original")
    axes.set(xlabel="test accuracy, %", yticks=places, yticklabels=labels)
    axes.invert_yaxis()
    _legend(axes)


def _points(group: Group, labels: Sequence[str]) -> list[tuple[float, float, float]]:
    """Zeros, accuracy and its deviation, all in percent, of the cells that have records."""
    found = []
    for label in labels:
        ours = group.spread(label, tables.accuracy_of)
        zeros = group.spread(label, lambda record: 100 * record["result"]["sparsity"])
        if ours and zeros:
            found.append((zeros.mean, ours.mean, _bar(ours)))
    return found


def _sparsity(axes: Axes, group: Group) -> None:
    for number, (family, labels) in enumerate(tables.FAMILIES.items()):
        color = f"C{number}"
        if points := _points(group, labels):
            zeros, means, deviations = zip(*points, strict=True)
            axes.errorbar(zeros, means, deviations, fmt="o-", color=color, capsize=3, label=family)
        theirs = [
            (point[0], value)
            for label in labels
            if (point := next(iter(_points(group, [label])), None))
            and (value := tables.original("accuracy", group, label))
        ]
        if theirs:
            axes.plot(*zip(*theirs, strict=True), "x--", color=color, alpha=0.6, label=f"{family}, original")
    axes.set(xlabel="zero weights, %", ylabel="test accuracy, %")
    _legend(axes)


def _sizes(axes: Axes, group: Group) -> None:
    labelled = set()
    for number, label in enumerate(label for label in group.labels if group.of(label)[0]["files"]):
        for name, marker in MARKERS.items():
            gzip = group.spread(label, tables.file_of(name, "gzip"))
            accuracy = group.spread(label, tables.file_of(name, "accuracy", times=100))
            if gzip and accuracy:
                axes.plot(
                    gzip.mean / 1024, accuracy.mean, marker, color=f"C{number % 10}", ms=5,
                    label=None if label in labelled else label,
                )  # fmt: skip
                labelled.add(label)
    for name, marker in MARKERS.items():
        axes.plot([], [], marker, color="grey", ms=5, label=name)
    axes.set(xscale="log", xlabel="KiB, gzip -9", ylabel="test accuracy, %")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    _legend(axes)


def _bytes(axes: Axes, group: Group) -> None:
    labels = [label for label in group.labels if group.of(label)[0]["files"]]
    height = 0.8 / len(MARKERS)
    for lane, name in enumerate(MARKERS):
        found = [(place, group.spread(label, tables.file_of(name, "gzip"))) for place, label in enumerate(labels)]
        there = [(place + (lane - 2) * height, spread.mean / 1024) for place, spread in found if spread]
        if there:
            places, sizes = zip(*there, strict=True)
            axes.barh(places, sizes, height, color=f"C{lane}", label=name)
    for kind, mark in (("float32", "k|"), ("quantized", "r|")):
        theirs = [
            (size[kind] / 1024, place)
            for place, label in enumerate(labels)
            if (size := tables.original("gzip", group, label))
        ]
        if theirs:
            axes.plot(*zip(*theirs, strict=True), mark, ms=16, mew=2, label=f"original, {kind}")
    axes.set(xlabel="KiB, gzip -9", yticks=range(len(labels)), yticklabels=labels)
    axes.invert_yaxis()
    _legend(axes)


def _speed(axes: Axes, group: Group) -> None:
    labels = group.labels
    rates = [group.spread(label, lambda record: record["result"]["images_per_second"]) for label in labels]
    axes.barh(
        range(len(labels)), [rate.mean for rate in rates if rate], 0.6,
        xerr=[_bar(rate) for rate in rates if rate], capsize=3,
    )  # fmt: skip
    titles = [
        f"{label}\n{(first := group.of(label)[0])['precision']}, {first['ranks']} x {first['device'] or 'CPU'}"
        for label in labels
    ]
    axes.set(xlabel="images per second", yticks=range(len(labels)))
    axes.set_yticklabels(titles, fontsize="x-small")
    axes.invert_yaxis()
