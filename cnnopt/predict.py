"""Classify images with an exported network.

    python -m cnnopt.predict runs/NAME photo.jpg folder/ --file clustered-int8
    curl -s https://... | python -m cnnopt.predict runs/NAME - --json

An image may have any size and any format that Pillow reads. The square in its middle is scaled to 32 x 32 pixels.
Prints the five likeliest classes of each image. Needs no data set, and no TensorFlow if ai-edge-litert is installed.
Exit status: 0 done, 1 failed, 2 wrong input.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnopt.command_line import Parser, one_line
from cnnopt.distributed import host
from cnnopt.errors import UserError
from cnnopt.output import need_readers
from cnnopt.packages import RUNTIMES, choose_runtime
from cnnopt.run import atomic_files
from cnnopt.run.run_folder import RunFolder

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

#: The number of classes that are printed for an image.
TOP = 5


class PredictError(UserError):
    """A request that cannot be answered. The message is one line that names the flag or the file and the remedy."""


def exported(run: Path, name: str) -> tuple[Path, list[str]]:
    """The path of file ``name`` of a run, and the classes of the run's data set. Raises UserError."""
    if not os.path.isdir(run):
        raise PredictError(f"{run}: no such run folder; name one that train_hvd.py made")
    path = run / "export" / f"{name}.tflite"
    if not os.path.isfile(path):
        there = sorted(file.stem for file in path.parent.glob("*.tflite"))
        remedy = f"choose --file {' or '.join(there)}" if there else f"run python -m cnnopt.quantize {run} first"
        raise PredictError(f"{path}: no such file; {remedy}")
    card = run / "report.json"
    report = atomic_files.read_json(card, f"run python -m cnnopt.quantize {run} again").get("run")
    classes = report.get("classes") if isinstance(report, dict) else None
    if not isinstance(classes, list) or not classes:
        raise PredictError(f"{card} names no classes: run python -m cnnopt.quantize {run} again")
    return path, [str(name) for name in classes]


def image_files(named: Sequence[str]) -> Iterator[str]:
    """The named files, the files in named folders that Pillow may read, and ``-`` unchanged. Raises PredictError."""
    from PIL import Image

    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for name in named:
        if not os.path.isdir(name):
            yield name
            continue
        if RunFolder(Path(name)).is_run:
            raise PredictError(f"{name}: a run, not a folder of images; name one run, and then images")
        files = sorted(path for path in Path(name).rglob("*") if path.suffix.lower() in known and path.is_file())
        if not files:
            raise PredictError(f"{name}: no image in this folder; name a file or a folder that has some")
        yield from map(str, files)


def read_image(name: str) -> np.ndarray:
    """The middle square of an image, uint8 [32, 32, 3]. ``-`` means standard input. Raises PredictError."""
    import warnings

    import numpy as np
    from PIL import Image, ImageOps

    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise PredictError(f"{name}: {why}; name an image or a folder") from None
    try:
        with warnings.catch_warnings():
            # Pillow refuses an image that would fill the memory. From half that size on, it only warns.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                upright = ImageOps.exif_transpose(image)
                fitted = ImageOps.fit(_rgb(upright), (32, 32), Image.Resampling.BICUBIC)
    # Bytes from someone else can make the decoders raise almost any exception.
    except Exception as error:
        place = "standard input" if name == "-" else name
        detail = " ".join(str(error).split())[:120] if not isinstance(error, Image.UnidentifiedImageError) else ""
        raise PredictError(
            f"{place}: not an image that Pillow reads{f' ({detail})' if detail else ''}; give a PNG, JPEG or another"
        ) from None
    return np.asarray(fitted)


def _rgb(image: Image.Image) -> Image.Image:
    """The image with three bytes per pixel. Transparent parts are shown on white, and 16 bits are cut to 8."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        front = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", front.size, "white"), front).convert("RGB")
    return image.convert("RGB")


def predict(
    path: Path, classes: Sequence[str], names: Sequence[str], *, threads: int, runtime: str | None
) -> list[Any]:
    """The name of each image and its likeliest classes with their probabilities, in the form that ``--json`` prints.

    Raises UserError if a file cannot be read or run. The interpreter is loaded after all images are read.
    """
    import numpy as np

    from cnnopt.export import interpret, measure, tflite_file

    data = tflite_file.read(path)
    images = np.stack([read_image(name) for name in names])
    chosen = choose_runtime(runtime)
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    shares = measure.probabilities(interpret.logits(data, path, images, threads=threads, runtime=chosen))
    if shares.shape[1] != len(classes):
        raise PredictError(f"{path}: {shares.shape[1]} classes, but report.json names {len(classes)}; quantize again")
    likeliest = np.argsort(-shares, axis=1, kind="stable")[:, :TOP]
    return [
        {"image": name, "predictions": [{"class": classes[i], "probability": float(row[i])} for i in top]}
        for name, row, top in zip(names, shares, likeliest, strict=True)
    ]


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print a table with a few lines for each image."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("image", "class"):
        table.add_column(column, overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for result in results:
        for place, guess in enumerate(result["predictions"]):
            last = place == len(result["predictions"]) - 1
            name = result["image"] if place == 0 else ""
            table.add_row(name, guess["class"], f"{100 * guess['probability']:.1f}%", end_section=last)
    Console(highlight=False, markup=False).print(table)


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="python -m cnnopt.predict", description=__doc__)
    made.add_argument("run", type=Path, metavar="RUN", help="folder of a run that cnnopt.quantize has exported")
    made.add_argument("images", nargs="+", metavar="IMAGE", help="image file or folder of them; - for standard input")
    made.add_argument("--file", default="int8", metavar="NAME", help="file of RUN/export that predicts [int8]")
    made.add_argument("--threads", type=int, metavar="N", help="threads that share the images [all cores]")
    made.add_argument("--runtime", choices=RUNTIMES, help="interpreter [litert where it is installed, else tf]")
    made.add_argument("--json", action="store_true", help="print a list of images and their predictions")
    return made


@one_line("cnnopt.predict")
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Every expected failure prints one line and gives an exit status."""
    given = parser().parse_args(argv)
    if given.threads is not None and given.threads < 1:
        raise PredictError(f"--threads {given.threads}: give 1 or more")
    if given.images.count("-") > 1:
        raise PredictError("- is named twice, but standard input holds one image; name it once")
    path, classes = exported(given.run, given.file)
    names = list(image_files(given.images))
    results = predict(path, classes, names, threads=given.threads or host.cores(), runtime=given.runtime)
    if given.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)
    return 0


if __name__ == "__main__":
    need_readers()
    sys.exit(main())
