"""Pictures for TensorBoard, drawn with Pillow: zeros by layer and step, a confusion matrix, images with answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: Pixels of the text.
TEXT = 13
GAP = 6
#: The most columns of a heat map. More are thinned out.
MOST_COLUMNS = 360
#: The most classes for which a confusion matrix has room for its numbers.
MOST_NUMBERS = 20
LIGHT, DARK = np.array([247, 250, 252]), np.array([8, 48, 107])
RIGHT, WRONG, BLACK = "#1a7f37", "#b3261e", "#1b1b1b"


@dataclass(frozen=True)
class Answer:
    """An image, uint8 [32, 32, 3], its class, and the answer of a network with its probability."""

    image: np.ndarray
    label: str
    answer: str
    probability: float


def shade(share: float) -> tuple[int, int, int]:
    """The colour of a share from 0 to 1, from light to dark."""
    red, green, blue = np.rint(LIGHT + (DARK - LIGHT) * min(1.0, max(0.0, share))).astype(int)
    return int(red), int(green), int(blue)


def zeros(history: Mapping[int, Mapping[str, float]]) -> np.ndarray:
    """The share of zeros of each layer (a row) after each recorded step (a column), uint8 [height, width, 3]."""
    steps = sorted(history)
    if len(steps) > MOST_COLUMNS:
        steps = [steps[i] for i in np.linspace(0, len(steps) - 1, MOST_COLUMNS).round().astype(int)]
    layers = list(history[steps[-1]])
    font, cell, row = _font(), max(2, min(24, 720 // len(steps))), TEXT + 3
    left = max(int(font.getlength(f"{name} 100.0%")) for name in layers) + 2 * GAP
    width = max(left + cell * len(steps) + GAP, left + 320)
    canvas, draw = _canvas(width, (len(layers) + 2) * row + 2 * GAP)
    draw.text((GAP, GAP), "zeros by layer and step: light 0%, dark 100%", BLACK, font)
    for i, layer in enumerate(layers):
        top = GAP + (i + 1) * row
        draw.text((GAP, top), layer, BLACK, font)
        draw.text((left - GAP, top), f"{history[steps[-1]][layer]:.1%}", BLACK, font, anchor="ra")
        for column, step in enumerate(steps):
            at = left + column * cell
            draw.rectangle((at, top, at + cell - 1, top + row - 2), shade(history[step].get(layer, 0.0)))
    bottom = GAP + (len(layers) + 1) * row
    draw.text((left, bottom), f"step {steps[0]:,}", BLACK, font)
    draw.text((max(left + cell * len(steps), left + 320), bottom), f"{steps[-1]:,}", BLACK, font, anchor="ra")
    return np.asarray(canvas)


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> np.ndarray:
    """A confusion matrix, shares of its rows as colours: uint8 [height, width, 3]."""
    font, numbered = _font(), len(names) <= MOST_NUMBERS
    cell = 56 if numbered else 7
    left = max(int(font.getlength(name)) for name in names) + 2 * GAP if numbered else GAP
    top = 2 * GAP + 2 * (TEXT + 3) if numbered else GAP + TEXT + 3
    canvas, draw = _canvas(max(left + cell * len(names) + GAP, 360), top + cell * len(names) + GAP)
    draw.text((GAP, GAP), "rows: true classes, columns: predictions", BLACK, font)
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        y = top + i * cell
        if numbered:
            draw.text((GAP, y + cell // 2), name, BLACK, font, anchor="lm")
            draw.text((left + i * cell + cell // 2, top - GAP), _cut(name, font, cell - 2), BLACK, font, anchor="ms")
        for j, count in enumerate(row):
            x, share = left + j * cell, count / max(1, sum(row))
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), shade(share))
            if numbered and count:
                color = "white" if share > 0.5 else BLACK
                draw.text((x + cell // 2, y + cell // 2), f"{count}", color, font, anchor="mm")
    return np.asarray(canvas)


def answers(shown: Sequence[Answer], *, columns: int = 5) -> np.ndarray:
    """Images with their classes and the answers below them, green if right, uint8 [height, width, 3]."""
    font, size = _font(), 96
    width, height = size + 44, size + 2 * (TEXT + 3) + GAP
    canvas, draw = _canvas(width * min(columns, len(shown)) + GAP, height * -(-len(shown) // columns) + GAP)
    for i, each in enumerate(shown):
        x, y = GAP + i % columns * width, GAP + i // columns * height
        canvas.paste(Image.fromarray(each.image).resize((size, size), Image.Resampling.NEAREST), (x, y))
        color = RIGHT if each.answer == each.label else WRONG
        draw.text((x, y + size + 2), _cut(each.label, font, width - GAP), BLACK, font)
        text = _cut(f"{each.answer} {each.probability:.0%}", font, width - GAP)
        draw.text((x, y + size + 2 + TEXT + 3), text, color, font)
    return np.asarray(canvas)


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", (int(width), int(height)), "white")
    return canvas, ImageDraw.Draw(canvas)


def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(TEXT)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
