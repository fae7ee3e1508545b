"""Draws charts as plain SVG, one small function for each. Charts stay readable at 360 pixels. Standard library only.

Colours are CSS variables of page.html, so that one picture serves the light and the dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 320
LEFT, RIGHT, TOP, BOTTOM = 36, 8, 10, 34
#: The radius of a dot, and the least distance between two dots (along x or y).
RADIUS, APART = 8, 14


@dataclass(frozen=True)
class Point:
    """A measurement with its interval. ``label`` is the text in the dot, ``title`` the text under the pointer."""

    x: float
    y: float
    low: float
    high: float
    label: str
    title: str
    color: int = 0
    strong: bool = True


@dataclass(frozen=True)
class Line:
    """A curve."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int
    dashed: bool = False


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95% interval of the share ``correct`` / ``total`` (Wilson 1927)."""
    z, share = 1.96, correct / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def pareto(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, sorted by size: the points for which no other point is both smaller and better."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers between ``low`` and ``high``."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def scatter(points: Sequence[Point], x_label: str, y_label: str, *, fronts: Sequence[Sequence[Point]]) -> str:
    """Points with their intervals on a logarithmic x axis, and a line along each front.

    The y axis is at least four intervals high, so that noise looks like noise. A dot that would cover another one is
    moved to the right.
    """
    low, high = min(p.low for p in points), max(p.high for p in points)
    least = 4 * max(p.high - p.low for p in points)
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    margin = 0.05 * (high - low)
    low, high = low - margin, min(100 + margin, high + margin)
    first, last = min(p.x for p in points) / 1.3, max(p.x for p in points) * 1.3
    height = 240
    across = _scale(math.log(first), math.log(last), LEFT, WIDTH - RIGHT)
    up = _scale(low, high, height - BOTTOM, TOP)
    decades = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    marks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    parts = _frame(
        height, x_label, y_label,
        [(across(math.log(mark)), f"{mark:g}") for mark in marks if first <= mark <= last],
        [(up(mark), f"{mark:g}") for mark in ticks(low, high)],
    )  # fmt: skip
    for front in fronts:
        places = [(across(math.log(p.x)), up(p.y)) for p in front]
        path = f"M{places[0][0]:.1f} {places[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
        parts.append(f'<path class="front c{front[0].color}" d="{path}H{WIDTH - RIGHT}"/>')
    placed: list[tuple[float, float]] = []
    for p in points:
        x, y = across(math.log(p.x)), up(p.y)
        while any(abs(x - other) < APART and abs(y - there) < APART for other, there in placed):
            x += APART / 2
        placed.append((x, y))
        kind = f"c{p.color}" + ("" if p.strong else " weak")
        parts.append(
            f'<g class="point {kind}"><title>{escape(p.title)}</title>'
            f'<path d="M{x:.1f} {up(p.low):.1f}V{up(p.high):.1f}M{x - 4:.1f} {up(p.low):.1f}h8'
            f'M{x - 4:.1f} {up(p.high):.1f}h8"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>'
            f'<text x="{x:.1f}" y="{y + 3.5:.1f}">{escape(p.label)}</text></g>'
        )
    return _svg(height, parts, f"{y_label} against {x_label}")


def curves(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Lines in percent, over one x axis that begins at 0."""
    height = 200
    last = max((x for line in lines for x, _ in line.points), default=1) or 1
    across, up = _scale(0, last, LEFT, WIDTH - RIGHT), _scale(0, 100, height - BOTTOM, TOP)
    parts = _frame(
        height, x_label, y_label,
        [(across(mark), f"{mark:g}") for mark in ticks(0, last) if mark == int(mark)],
        [(up(mark), f"{mark:g}") for mark in (0, 20, 40, 60, 80, 100)],
    )  # fmt: skip
    for line in lines:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        dashed = " dashed" if line.dashed else ""
        parts.append(
            f'<polyline class="curve c{line.color}{dashed}" points="{path}"><title>{escape(line.name)}</title>'
            "</polyline>"
        )
    return _svg(height, parts, f"{y_label} by {x_label}")


def columns(values: Sequence[tuple[str, float]], y_label: str, level: float) -> str:
    """One column in percent for each named value, in order. ``level`` is a line across all columns."""
    height = 180
    up = _scale(0, 100, height - BOTTOM, TOP)
    each = (WIDTH - LEFT - RIGHT) / len(values)
    groups: dict[str, list[float]] = {}
    for i, (name, _) in enumerate(values):
        groups.setdefault(name.split("_")[0], []).append(LEFT + (i + 0.5) * each)
    # A group of one layer has no room for its name.
    marks = [(sum(places) / len(places), name) for name, places in groups.items() if len(places) > 1]
    parts = _frame(height, "layer, in the order of computation", y_label, marks,
                   [(up(mark), f"{mark:g}") for mark in (0, 25, 50, 75, 100)], grid=False)  # fmt: skip
    for i, (name, value) in enumerate(values):
        parts.append(
            f'<rect class="column" x="{LEFT + (i + 0.1) * each:.2f}" y="{up(value):.1f}" width="{0.8 * each:.2f}" '
            f'height="{max(0.0, height - BOTTOM - up(value)):.1f}"><title>{escape(name)}: {value:.1f}%</title></rect>'
        )
    parts.append(f'<path class="level" d="M{LEFT} {up(level):.1f}H{WIDTH - RIGHT}"/>')
    return _svg(height, parts, f"{y_label} by layer")


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A confusion matrix: a row for each true class, a column for each answer. The shade is the share of the row."""
    # The end of the last name needs room on the right.
    side, top, right = 72, 62, 20
    cell = (WIDTH - side - right) / len(names)
    height = int(top + cell * len(names) + 4)
    parts = []
    for i, name in enumerate(names):
        middle = (i + 0.5) * cell
        short = escape(name if len(name) <= 11 else f"{name[:10]}…")
        turned = f"translate({side + middle + 3:.1f} {top - 6}) rotate(-55)"
        parts.append(f'<text class="end" x="{side - 6}" y="{top + middle + 3.5:.1f}">{short}</text>')
        parts.append(f'<text class="start" transform="{turned}">{short}</text>')
    for i, row in enumerate(counts):
        total = max(1, sum(row))
        for j, count in enumerate(row):
            if not count:
                continue
            x, y, share = side + j * cell, top + i * cell, count / total
            # The shade follows the square root of the share: readers look for the mistakes, whose shares are small.
            kind = "right" if i == j else "wrong"
            light = ' class="light"' if math.sqrt(share) > 0.55 else ""
            parts.append(
                f'<g class="cell {kind}"><title>{escape(names[i])}, classified as {escape(names[j])}: {count}</title>'
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
                f'fill-opacity="{math.sqrt(share):.2f}"/>'
                f'<text x="{x + cell / 2:.1f}" y="{y + cell / 2 + 3:.1f}"{light}>{count}</text></g>'
            )
    return _svg(height, parts, "confusion matrix: rows: true classes, columns: predictions")


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _frame(
    height: float,
    x_label: str,
    y_label: str,
    x_marks: Sequence[tuple[float, str]],
    y_marks: Sequence[tuple[float, str]],
    *,
    grid: bool = True,
) -> list[str]:
    base, middle = height - BOTTOM, (TOP + height - BOTTOM) / 2
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{base}H{WIDTH - RIGHT}"/>']
    for x, text in x_marks:
        if grid:
            parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{base}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 13}">{escape(text)}</text>')
    for y, text in y_marks:
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 4}" y="{y + 3.5:.1f}">{escape(text)}</text>')
    parts.append(f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 4}">{escape(x_label)}</text>')
    parts.append(f'<text class="name" transform="translate(9 {middle}) rotate(-90)">{escape(y_label)}</text>')
    return parts
