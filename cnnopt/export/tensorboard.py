"""The report of a run in TensorBoard: the entry ``quantize``, in which all tags begin with ``quantize/``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from cnnopt import pictures
from cnnopt.distributed import host
from cnnopt.export import interpret, measure, page, tflite_file
from cnnopt.export.shipped import MEANING, shipped
from cnnopt.run.atomic_files import WriteError

if TYPE_CHECKING:
    from cnnopt.data.datasets import Dataset

#: The number of test images that are shown with their answers.
SAMPLES = 20
#: The end of the name of an event file in the entry of the evaluation. HParams reads its columns there.
SUFFIX = ".quantize"


def save(content: dict[str, Any], folder: Path, images: Dataset) -> None:
    """Write the content of a report.json to ``folder``/tb. The figure is ``folder``/report.png.

    The event files of an earlier report are deleted, so that each file has one point. Raises WriteError, TfliteError.
    """
    place, step, entry = folder / "tb" / "quantize", content["run"]["step"], page.best(content)
    try:
        for old in (*place.glob("events.out.tfevents.*"), *place.parent.glob(f"*/events.out.tfevents.*{SUFFIX}")):
            old.unlink()
        with _writer(place).as_default(step):
            for file in content["files"]:
                for name, value in scalars(file).items():
                    tf.summary.scalar(name, value)
            pixels = tf.io.decode_png((folder / "report.png").read_bytes(), channels=3)
            tf.summary.image("quantize/figure", pixels[tf.newaxis])
            confusion = pictures.confusion(entry["test"]["confusion"], content["run"]["classes"])
            tf.summary.image("quantize/confusion", confusion[np.newaxis])
            shown = pictures.answers(samples(folder / entry["file"], images))
            tf.summary.image("quantize/answers", shown[np.newaxis])
            tf.summary.text("quantize/report", text(content).encode(errors="backslashreplace"))
        for evaluated in ("validation", "test"):
            if (place.parent / evaluated).exists():
                with _writer(place.parent / evaluated, SUFFIX).as_default(step):
                    tf.summary.scalar("quantize/bytes_to_ship", shipped(entry).bytes)
    except (OSError, tf.errors.OpError) as error:
        raise WriteError(f"{place}: cannot be written ({error}); free some space there") from None


def _writer(place: Path, suffix: str = "") -> tf.summary.SummaryWriter:
    # Pass bytes: C++ encodes text as UTF-8, even if the locale uses another encoding for file names.
    return tf.summary.create_file_writer(os.fsencode(place), filename_suffix=suffix or None)


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The values to draw for one file of a report.json, by tag."""
    values = {
        "accuracy": entry["test"]["accuracy"],
        "bytes": shipped(entry).bytes,
        "latency_ms": entry["latency"][0]["median_ms"],
    }
    return {f"quantize/{quantity}/{entry['name']}": float(value) for quantity, value in values.items()}


def samples(path: Path, images: Dataset) -> list[pictures.Answer]:
    """Test images of all classes, or of the first ones, with the answers of a file. Raises TfliteError."""
    each = -(-SAMPLES // images.num_classes)
    chosen = [i for label in range(images.num_classes) for i in np.flatnonzero(images.test_labels == label)[:each]]
    chosen = chosen[:SAMPLES]
    logits = interpret.logits(tflite_file.read(path), path, images.test_images[chosen], threads=host.cores())
    shares, names = measure.probabilities(logits), images.class_names
    return [
        pictures.Answer(images.test_images[i], names[images.test_labels[i]], names[row.argmax()], float(row.max()))
        for i, row in zip(chosen, shares, strict=True)
    ]


def text(content: Mapping[str, Any]) -> str:
    """A short report in markdown: the headline, a table of the files, the notes."""
    rows: list[Sequence[str]] = [("file", "KiB", "smaller", "top-1 %", "ms"), ("---", "---:", "---:", "---:", "---:")]
    for entry in content["files"]:
        form = shipped(entry)
        milliseconds = entry["latency"][0]["median_ms"]
        accuracy = f"{100 * entry['test']['accuracy']:.2f}"
        rows.append(
            (entry["name"], f"{form.bytes / 1024:.1f}", f"{form.times_smaller:.2f}x", accuracy, f"{milliseconds:.2f}")
        )
    return "\n".join(
        [
            f"**{page.headline(content)}**",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"KiB as it is shipped; smaller: {MEANING}; ms: median of one image at one thread.",
            "",
            *(f"- {note}" for note in content["notes"]),
        ]
    )
