"""report.html and comparison.html: the measurements in one file, which loads nothing from any network.

Charts are plain SVG (``cnnopt.export.charts``). The page of one run also contains the best int8 file itself;
network.js runs that file in the reader's browser.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnopt.config import TrainConfig
from cnnopt.export import charts, render
from cnnopt.export.shipped import MEANING, shipped
from cnnopt.run import atomic_files
from cnnopt.run.run_folder import RunFolder, minutes, monitored

if TYPE_CHECKING:
    import numpy as np

    from cnnopt.data.datasets import Dataset

#: Files that network.js can run.
RUNNABLE = ("int8", "clustered-int8", "int8-qat", "clustered-int8-qat")
#: The number of test images beside the network: one for each of the first classes.
SAMPLES = 10
#: Bytes of the largest network in a page. With a larger one the page is too large to send, and says so instead.
MAX_NETWORK = 1_600_000
#: The number of colours in page.html. Runs take the colours in turn.
COLORS = 8
#: The most classes for which a confusion matrix has room for its numbers.
MATRIX_CLASSES = 20
HERE = Path(__file__).parent


def reference(content: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of the float32 file that the others are compared with."""
    return next(entry for entry in content["files"] if entry["name"] == content["reference"]["file"])


def own(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The files of this run, without the baseline's, which holds another network."""
    chosen = content["reference"]
    return [e for e in content["files"] if chosen.get("kind") != "baseline" or e["name"] != chosen["file"]]


def best(content: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest int8 file whose accuracy is within the reference's 95% interval, or else the most accurate one.

    If there is no int8 file, the choice is among all files of the run. It is made on validation images, if the run held
    some out.
    """
    split = chosen_on(content)
    files = [entry for entry in own(content) if entry[split]]
    entries = [entry for entry in files if entry["name"] in RUNNABLE] or files
    against = reference(content)[split]
    if not against:
        # The baseline has other validation images. It may have learned those of this run.
        against = next(entry for entry in files if entry["name"] == "float32")[split]
    least = charts.wilson(against["correct"], against["images"])[0]
    as_good = [entry for entry in entries if entry[split]["accuracy"] >= least]
    if as_good:
        return min(as_good, key=lambda entry: shipped(entry).bytes)
    return max(entries, key=lambda entry: entry[split]["accuracy"])


def chosen_on(content: Mapping[str, Any]) -> str:
    """The images by which ``best`` chooses: ``validation`` or ``test``."""
    return "validation" if any(entry.get("validation") for entry in content["files"]) else "test"


def headline(content: Mapping[str, Any]) -> str:
    """One line that compares the best file with the reference."""
    entry, against = best(content), reference(content)
    lost = 100 * (against["test"]["accuracy"] - entry["test"]["accuracy"])
    speed = against["latency"][0]["median_ms"] / entry["latency"][0]["median_ms"]
    points = f"{abs(lost):.1f} points {'gained' if lost <= -0.05 else 'lost'}"
    pace = f"{speed:.1f}x faster" if speed >= 1 else f"{1 / speed:.1f}x slower"
    # Without a dense run beside it, the figures do not say what pruning has cost.
    itself = " than its own float32 file" if content["reference"].get("kind") == "self" else ""
    return f"{entry['name']}: {shipped(entry).times_smaller:.1f}x smaller, {points}, {pace}{itself}"


def save(content: Mapping[str, Any], folder: Path, images: Dataset) -> None:
    """Write report.html of the run in ``folder``. Raises WriteError, TfliteError."""
    atomic_files.replace(folder / "report.html", run_page(content, folder, images))


def run_page(content: Mapping[str, Any], folder: Path, images: Dataset) -> str:
    """The page of one run. ``content`` is its report.json; ``images`` is the data set of the measurements."""
    run, entry = content["run"], best(content)
    record = RunFolder(folder)
    metrics = record.metrics() if record.metrics_file.exists() else []
    title = f"{Path(run['path']).name}: ResNet-{run['depth']} on {run['dataset']}"
    test, against = entry["test"], reference(content)
    summary = (
        f"ResNet-{run['depth']} on {run['dataset']}, {run['parameters']:,} parameters, {run['sparsity']:.0%} of the "
        f"weights zero. {test['images']:,} test images: {_percent(test)} right, against {_percent(against['test'])} of "
        f"{against['name']}. Smaller: {MEANING}. Faster: one image at one thread."
    )
    layers = entry["weights"]["layers"]
    zeros = [(layer, 100 * (1 - found["nonzero"] / found["weights"])) for layer, found in layers.items()]
    sections = [
        _network(content, folder, images),
        section("Accuracy and size", _accuracy([("", content, 0)])),
        section("Files", _files(content)),
        section("Other formats", _formats(content)) if content.get("formats") else "",
        section("Latency", _latency((e["name"], e, 0) for e in content["files"])),
        section(
            f"Zeros of {entry['name']} by layer",
            charts.columns(zeros, "zeros, %", 100 * entry["weights"]["sparsity"]),
        ),
        section(f"What {entry['name']} confuses", _confusion(test["confusion"], run["classes"])),
        section(f"The most confident mistakes of {entry['name']}", _mistakes(test["mistakes"], images)),
        section("Where zeros could have been lost", _ledger(content)),
        section("Training", _training([("", metrics)])) if metrics else "",
        section("How it was made", _origin(content, folder, metrics)),
        section("What the figures say", "".join(f"<p>{escape(note)}</p>" for note in content["notes"])),
    ]
    return _page(title, headline(content), summary, sections)


def comparison_page(runs: Sequence[Any], *, title: str | None = None, first: Sequence[str] = ()) -> str:
    """The page of several runs, each a ``cnnopt.groups.Run``. ``first`` are sections that come before all others."""
    cards = [(run.name, run.card, number % COLORS) for number, run in enumerate(runs) if run.card]
    lines = "".join(
        f'<li><i class="key c{number % COLORS}"></i>{escape(run.name)}: '
        f"{escape(headline(run.card)) if run.card else 'not quantized'}</li>"
        for number, run in enumerate(runs)
    )
    sections = [*first, section("Runs", f"<ul>{lines}</ul>", "wide")]
    if cards:
        sections += [
            section("Accuracy and size", _accuracy(cards)),
            section(
                "Latency",
                _latency((f"{name}: {e['name']}", e, color) for name, card, color in cards for e in card["files"]),
            ),
        ]
    if any(run.metrics for run in runs):
        sections.append(section("Training", _training([(run.name, run.metrics) for run in runs])))
    best_run = max(cards, key=lambda card: shipped(best(card[1])).times_smaller, default=None)
    line = f"{best_run[0]}, {headline(best_run[1])}" if best_run else f"{len(runs)} runs"
    return _page(
        title or ", ".join(run.name for run in runs),
        line,
        "The run whose best file is the most times smaller.",
        sections,
    )


# Parts -------------------------------------------------------------------------------------------------------------


def _page(title: str, line: str, summary: str, sections: Iterable[str]) -> str:
    page = (HERE / "page.html").read_text()
    for name, value in (("title", escape(title)), ("headline", escape(line)), ("summary", escape(summary))):
        page = page.replace(f"[[{name}]]", value)
    # Sections come last, because their text may look like a placeholder.
    return page.replace("[[sections]]", "\n".join(filter(None, sections)))


def section(title: str, body: str, kind: str = "") -> str:
    """A section of a page. ``body`` is HTML. ``kind``: ``wide`` for one that takes the whole width."""
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{body}</section>'


def _percent(test: Mapping[str, Any]) -> str:
    low, high = charts.wilson(test["correct"], test["images"])
    return f"{100 * test['accuracy']:.2f}% (95%: {100 * low:.1f} to {100 * high:.1f})"


def _accuracy(cards: Sequence[tuple[str, Mapping[str, Any], int]]) -> str:
    """All files of all cards (name, report, colour), with the front of each card as a line."""
    everything, fronts = [], []
    for name, card, color in cards:
        points = []
        for number, entry in enumerate(card["files"], start=1):
            test = entry["test"]
            low, high = charts.wilson(test["correct"], test["images"])
            size = shipped(entry).bytes / 1024
            who = f"{name}: {entry['name']}" if name else entry["name"]
            points.append(
                charts.Point(
                    size, 100 * test["accuracy"], 100 * low, 100 * high, str(number),
                    f"{who}: {size:.1f} KiB, {100 * test['accuracy']:.2f}%", color,
                )
            )  # fmt: skip
        fronts.append(charts.pareto(points))
        everything += [p if p in fronts[-1] else charts.Point(**{**vars(p), "strong": False}) for p in points]
    legend = "".join(
        f"<li>{f'{escape(name)}: ' if name else ''}"
        + ", ".join(f"<b>{i}</b> {escape(entry['name'])}" for i, entry in enumerate(card["files"], start=1))
        + "</li>"
        for name, card, _ in cards
    )
    chart = charts.scatter(everything, "KiB, packed or gzip -9", "test accuracy, %", fronts=fronts)
    return (
        f"{chart}<ul class=legend>{legend}</ul><p class=small>Bars are 95% intervals from the number of test images. "
        "The line joins the files that no other is both smaller and better than (Pareto front). Dots that would lie "
        "upon each other are moved to the right.</p>"
    )


def _files(content: Mapping[str, Any]) -> str:
    names = (
        ("", ""),
        ("", "file"),
        ("n", "KiB"),
        ("n", "smaller"),
        ("n", "top-1 %"),
        ("n agree", "agree %"),
        ("n", "ms"),
    )
    head = "".join(f'<th class="{kind}">{name}</th>' for kind, name in names)
    rows = []
    for number, entry in enumerate(content["files"], start=1):
        form, test = shipped(entry), entry["test"]
        cells = (
            ("n", f"{form.bytes / 1024:.1f}"),
            ("n", f"{form.times_smaller:.2f}x"),
            ("n", f"{100 * test['accuracy']:.2f}"),
            ("n agree", f"{100 * test['agreement']:.2f}"),
            ("n", f"{entry['latency'][0]['median_ms']:.2f}"),
        )
        mark = ' class="best"' if entry is best(content) else ""
        rows.append(
            f"<tr{mark}><td>{number}</td><td>{escape(entry['name'])}</td>"
            + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in cells)
            + "</tr>"
        )
    return (
        f"<div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>"
        f"<p class=small>KiB as it is shipped. Smaller: {MEANING}; agree: share of test images on which the file and "
        "the float32 network name one class; ms: median of one image at one thread.</p>"
    )


def _formats(content: Mapping[str, Any]) -> str:
    rows = [render.FORMAT_COLUMNS, *render.format_rows(content)]
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table>{cells}</table></div><p class=small>{render.FORMATS_MEANING}. Sizes in KiB.</p>"


def _latency(entries: Iterable[tuple[str, Mapping[str, Any], int]]) -> str:
    timings = [(name, entry["latency"][0], color) for name, entry, color in entries]
    # The median matters and sets the scale. A tail may be many medians long.
    longest = 1.3 * max(timing["median_ms"] for _, timing, _ in timings)
    rows = []
    for name, timing, color in timings:
        median, tail = (min(100.0, 100 * timing[key] / longest) for key in ("median_ms", "p99_ms"))
        title = f"median {timing['median_ms']:.2f} ms, 99% within {timing['p99_ms']:.2f} ms"
        rows.append(
            f'<div class="bar c{color}" title="{title}">'
            f"<span>{escape(name)}</span><span class=n>{timing['median_ms']:.2f} ms</span>"
            f'<div><i class="tail" style="width:{tail:.1f}%"></i><i style="width:{median:.1f}%"></i></div></div>'
        )
    return (
        f"{''.join(rows)}<p class=small>One image, one thread: median, and the light part to the 99th percentile.</p>"
    )


def _confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    if len(names) <= MATRIX_CLASSES:
        return f"{charts.matrix(counts, names)}<p class=small>Rows: true classes. Columns: predictions.</p>"
    pairs = sorted(
        ((count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count),
        key=lambda pair: (-pair[0], pair[1:]),
    )
    rows = "".join(
        f"<tr><td class=n>{count}</td><td>{escape(names[i])}</td><td>{escape(names[j])}</td></tr>"
        for count, i, j in pairs[:20]
    )
    return f"<table><tr><th>times</th><th>was</th><th>taken for</th></tr>{rows}</table>"


def _mistakes(found: Sequence[Mapping[str, Any]], images: Dataset) -> str:
    names = images.class_names
    figures = "".join(
        f"<figure>{_picture(images.test_images[wrong['image']], names[wrong['label']])}<figcaption>"
        f"<b>{escape(names[wrong['label']])}</b><br>{escape(names[wrong['predicted']])} {wrong['probability']:.0%}"
        "</figcaption></figure>"
        for wrong in found
    )
    if not figures:
        return "<p>None: every test image was classified correctly.</p>"
    return f"<div class=pictures>{figures}</div><p class=small>The true class, and below it the answer.</p>"


def _picture(pixels: np.ndarray, name: str) -> str:
    """An <img> element that contains the image uint8 [32, 32, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{content}" alt="{escape(name)}" width=64 height=64>'


def _ledger(content: Mapping[str, Any]) -> str:
    rows = []
    for entry in content["files"]:
        if ledger := entry["ledger"]:
            way = " → ".join(f"{line['stage']} {line['zeros']:,}" for line in ledger["stages"])
            lost = (
                f"{ledger['stages'][-1]['lost']:,}, first at {ledger['first_loss']}" if ledger["first_loss"] else "none"
            )
            rows.append(f"<tr><td>{escape(entry['name'])}</td><td>{escape(way)}</td><td>{escape(lost)}</td></tr>")
    head = "<tr><th>file</th><th>zeros at each stage</th><th>lost</th></tr>"
    return f"<div class=scroll><table>{head}{''.join(rows)}</table></div>"


def _training(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> str:
    lines = []
    splits = {"val": "validation accuracy", "test": "test accuracy"}
    for number, (name, metrics) in enumerate(runs):
        split = monitored(metrics[-1]) if metrics else "test"
        kinds = [(splits[split], f"{split}_accuracy", False)]
        kinds += [("training accuracy", "accuracy", True), ("zeros", "sparsity", False)] if len(runs) == 1 else []
        for place, (kind, key, dashed) in enumerate(kinds):
            points = [(line["epoch"], 100 * line[key]) for line in metrics]
            title, color = (kind, place) if len(runs) == 1 else (name, number % COLORS)
            lines.append(charts.Line(title, points, color, dashed))
    keys = "".join(f'<li><i class="key c{line.color}"></i>{escape(line.name)}</li>' for line in lines)
    drawn = sorted({splits[monitored(line)] for _, metrics in runs for line in metrics[-1:]})
    label = "%" if len(runs) == 1 else f"{', '.join(drawn)}, %"
    return f"{charts.curves(lines, 'epoch', label)}<ul class=legend>{keys}</ul>"


def _origin(content: Mapping[str, Any], folder: Path, metrics: Sequence[Mapping[str, Any]]) -> str:
    identity = RunFolder(folder).identity("restore it from a copy")
    machine, rows = content["machine"], [("command", f"<code>{escape(command(identity))}</code>")]
    environment = folder / "env.json"
    if environment.exists():
        trained = atomic_files.read_json(environment, "restore it from a copy")
        ranks = f", {trained['ranks']} rank(s)" if "ranks" in trained else ""
        spent = f", {minutes(metrics):.1f} minutes" if metrics else ""
        packages = ", ".join(f"{name} {version}" for name, version in trained.get("packages", {}).items() if version)
        rows.append(("trained on", escape(f"{trained.get('cpu')}{ranks}{spent}")))
        rows.append(("with", escape(f"{packages}; commit {trained.get('commit')}")))
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    rows.append(("measured on", escape(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f}")))
    rows.append(("with", escape(f"{packages}, Python {machine['python']}")))
    rows.append(("at", escape(content["created"])))
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows) + "</dl>"


def command(identity: Mapping[str, Any]) -> str:
    """The shortest ``train_hvd.py`` command for a run with this identity."""
    usual = TrainConfig().identity()
    flags = []
    for name, value in identity.items():
        # The defaults of these two depend on the optimizer.
        if name in ("base_lr", "weight_decay") and "optimizer" in identity:
            usual |= {name: TrainConfig(optimizer=identity["optimizer"]).identity()[name]}
        if name in usual and value != usual[name] and not (name == "sparsity_schedule" and value == "none"):
            flag = f"--{name.replace('_', '-')}"
            flags.append(flag if value is True else f"{flag} {value}")
    return " ".join(["python train_hvd.py", *flags])


def _network(content: Mapping[str, Any], folder: Path, images: Dataset) -> str:
    """The section in which readers try the best file on ten test images and on their own pictures."""
    from cnnopt.export import tflite_file

    entry = best(content)
    if entry["name"] not in RUNNABLE:
        return ""
    path = folder / entry["file"]
    description, constants = tflite_file.network(tflite_file.read(path), path)
    packed = base64.b64encode(gzip.compress(constants, 9, mtime=0)).decode()
    if len(packed) > MAX_NETWORK:
        return section("Try it", f"<p>{escape(entry['name'])} is too large for a page that can be sent.</p>", "wide")
    held = {"network": description, "constants": packed, "classes": list(images.class_names)}
    # A class name with "</script>" must not end the element.
    data = json.dumps(held, separators=(",", ":")).replace("<", "\\u003c")
    samples = "".join(
        f'<button type="button" class="sample">{_picture(images.test_images[i], images.class_names[label])}'
        f"<br>{escape(images.class_names[label])}</button>"
        for label in range(min(SAMPLES, images.num_classes))
        for i in (images.test_labels == label).nonzero()[0][:1]
    )
    body = f"""<p>{escape(entry["name"])} as it was exported, {len(packed) / 1024:.0f} KiB in this page, runs in your
browser: nothing is sent anywhere. Drop a picture, or choose one of these test images.</p>
<div class="try"><label id="drop">Drop a picture here, or click to choose<input type="file" id="file" accept="image/*">
</label><div><canvas id="seen" width="32" height="32" aria-label="what the network sees"></canvas></div>
<div id="answer" aria-live="polite">No picture yet.</div></div>
<div class="pictures">{samples}</div>
<p class=small>The square in the middle of a picture is scaled to 32 x 32 pixels, as python -m cnnopt.predict does; the
two may scale a large picture a little differently.</p>
<script type="application/json" id="network">{data}</script>
<script>{(HERE / "network.js").read_text()}</script><script>{(HERE / "page.js").read_text()}</script>"""
    return section("Try it", body, "wide")
