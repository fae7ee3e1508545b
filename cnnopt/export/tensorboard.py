"""The report of a run in TensorBoard (tb/quantize): one point per file, the figure, and the text of report.md."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tensorflow as tf

from cnnopt.export import render
from cnnopt.run.atomic_files import WriteError


def save(content: dict[str, Any], folder: Path) -> None:
    """Write the content of a report.json to ``folder``/tb/quantize. The figure is ``folder``/report.png.

    The event files of an earlier report are deleted, so that each file has one point. Raises WriteError.
    """
    place, step = folder / "tb" / "quantize", content["run"]["step"]
    try:
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        # Pass bytes: C++ encodes text as UTF-8, even if the locale uses another encoding for file names.
        writer = tf.summary.create_file_writer(os.fsencode(place))
        with writer.as_default(step):
            for entry in content["files"]:
                for name, value in scalars(entry).items():
                    tf.summary.scalar(name, value)
            pixels = tf.io.decode_png((folder / "report.png").read_bytes(), channels=3)
            tf.summary.image("figure", pixels[tf.newaxis])
            tf.summary.text("card", render.markdown(content).encode(errors="backslashreplace"))
        writer.close()
    except (OSError, tf.errors.OpError) as error:
        raise WriteError(f"{place}: cannot be written ({error}); free some space there") from None


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """The values to draw for one file of a report.json, by tag. A tag is a group (quantity) and a curve (file)."""
    size, test, timing = entry["size"], entry["test"], entry["latency"][0]
    values = {
        "accuracy": test["accuracy"],
        "loss": test["loss"],
        "agreement": test["agreement"],
        "bytes_raw": size["raw"],
        "bytes_gzip": size["gzip"],
        "bytes_entropy_bound": size["entropy_bound"],
        "sparsity": entry["weights"]["sparsity"],
        "latency_ms_1_thread": timing["median_ms"],
    }
    return {f"{quantity}/{entry['name']}": float(value) for quantity, value in values.items()}
