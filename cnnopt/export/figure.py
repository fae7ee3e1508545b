"""report.png: accuracy against compressed size, latency, and the sparsity and the quantization error of each layer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from cnnopt.export.shipped import shipped


def png(content: dict[str, Any]) -> bytes:
    """The figure of a report.json."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    files = content["files"]
    names = [entry["name"] for entry in files]
    # tab20 has twenty colours, a strong and a pale one of each hue. The strong ones come first.
    palette = matplotlib.colormaps["tab20"](range(20))
    colors = [*palette[::2], *palette[1::2]][: len(files)]
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(13, 9), layout="constrained")
        # A figure with a separate canvas needs no display and does not touch pyplot's state.
        FigureCanvasAgg(figure)
        (size, bars), (sparsity, error) = figure.subplots(2, 2)
        run = content["run"]
        figure.suptitle(
            f"{Path(run['path']).name}: ResNet-{run['depth']} on {run['dataset']}, {run['sparsity']:.0%} zero"
        )

        for entry, color in zip(files, colors, strict=True):
            best = shipped(entry).bytes
            top = 100 * entry["test"]["accuracy"]
            size.plot([best / 1024, entry["size"]["raw"] / 1024], [top, top], color=color, linewidth=1, alpha=0.4)
            size.plot(entry["size"]["raw"] / 1024, top, "|", color=color)
            size.plot(best / 1024, top, "o", color=color, label=entry["name"])
        size.set(xscale="log", xlabel="KiB: dot compressed (packed or gzip -9), bar raw", ylabel="test accuracy, %")
        size.legend(fontsize="small")

        lanes = len(files[0]["latency"])
        for lane in range(lanes):
            timings = [entry["latency"][lane] for entry in files]
            places = [i + (lane - (lanes - 1) / 2) * 0.8 / lanes for i in range(len(files))]
            medians = [t["median_ms"] for t in timings]
            tails = [[0] * len(files), [t["p99_ms"] - t["median_ms"] for t in timings]]
            bars.barh(places, medians, 0.8 / lanes, label=f"{timings[0]['threads']} thread(s)", color=f"C{lane}")
            bars.errorbar(medians, places, xerr=tails, fmt="none", ecolor="black", linewidth=0.8)
        bars.set(xlabel="ms an image, batch 1: bar median, line to p99", yticks=range(len(files)), yticklabels=names)
        bars.set_xlim(0, 1.5 * max(t["median_ms"] for entry in files for t in entry["latency"]))
        bars.invert_yaxis()
        bars.legend(fontsize="small")

        layers = list(files[-1]["weights"]["layers"])
        for entry, color in zip(files, colors, strict=True):
            each = [entry["weights"]["layers"][layer] for layer in layers]
            sparsity.plot(
                [100 * (1 - e["nonzero"] / e["weights"]) for e in each], ".-", color=color, label=entry["name"]
            )
            if any(e["error"] for e in each):
                error.plot([100 * e["error"] for e in each], ".-", color=color, label=entry["name"])
        sparsity.set_ylim(-2, 102)
        for axes, label in (
            (sparsity, "zeros in the file, %"),
            (error, "error of the stored weights, % of their norm"),
        ):
            axes.set_ylabel(label)
            axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")
        image = io.BytesIO()
        figure.savefig(image, dpi=110)
        return image.getvalue()
