"""The command line of ``cnnopt.quantize``. Standard library only, so that a mistake is reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnnopt.command_line import Parser, nearest
from cnnopt.errors import UserError
from cnnopt.packages import RUNTIMES, choose_runtime, require

#: The files that can be exported. The end of a name says how the file stores its weights.
VARIANTS = {
    "float32": "weights and arithmetic in float32",
    "float16": "weights stored in float16, arithmetic in float32",
    "dynamic": "int8 weights, float32 in and out (dynamic range)",
    "int8": "int8 weights, activations, input and output",
    "sparse-float32": "float32 with zeros left out (EXPERIMENTAL_SPARSITY)",
    "sparse-dynamic": "dynamic with zeros left out",
    "sparse-int8": "int8 with zeros left out",
    "clustered-int8": "int8 with at most --clusters distinct values a kernel",
    "int8-qat": "int8 after --qat epochs of quantization-aware fine-tuning",
    "clustered-int8-qat": "clustered-int8 after --qat epochs of fine-tuning for it",
}
#: The flags that a variant needs.
NEEDS = {"clustered-int8": ("clusters",), "int8-qat": ("qat",), "clustered-int8-qat": ("clusters", "qat")}
#: The variants that --pack packs: int8 files that store their zeros.
PACKED = ("dynamic", "int8", *NEEDS)
#: Other formats of the float32 network. They are made only if --variants names them.
FORMATS = {
    "saved-model": "TensorFlow's SavedModel, for TensorFlow alone",
    "keras": "a .keras file, for tf_keras alone",
    "onnx": "ONNX, with BatchNorm folded in",
    "safetensors": "weights and masks by name",
}
#: The optional packages with which a format is written and measured.
FORMAT_PACKAGES = {"onnx": ("onnx", "onnxruntime"), "safetensors": ("safetensors",)}
MIN_CALIBRATION = 32
#: Without --calibration.
CALIBRATION = 500
#: Allowed numbers of distinct values of a kernel.
CLUSTERS = range(4, 257)


class OptionError(UserError):
    """A flag that is wrong. The message is one line that names the flag and the remedy."""


@dataclass(frozen=True)
class Options:
    """The parsed command line of ``cnnopt.quantize``."""

    run: Path
    variants: tuple[str, ...] | None
    formats: tuple[str, ...]
    clusters: int | None
    qat: int | None
    baseline: Path | None
    calibration: int | None
    seed: int
    data_dir: str | None
    pack: bool
    runtime: str

    def check_packages(self) -> None:
        """Raise MissingError if a package that these options need is not installed."""
        # Without TensorFlow nothing can be converted, whoever measures.
        if self.runtime != "tf":
            choose_runtime(self.runtime)
        for name in self.formats:
            require(f"--variants {name}", FORMAT_PACKAGES.get(name, ()))

    def asked(self) -> list[str]:
        """The variants that --variants names. Without --variants, all variants whose flags are given."""
        if self.variants is not None:
            return list(self.variants)
        given = {flag for flag in ("clusters", "qat") if getattr(self, flag) is not None}
        return [name for name in VARIANTS if given.issuperset(NEEDS.get(name, ()))]

    def calibration_of(self, dataset: str, images: int) -> int:
        """The number of calibration images, of ``images`` training images.

        Raises OptionError if ``dataset`` has fewer training images than --calibration asks for.
        """
        if self.calibration is None:
            return min(CALIBRATION, images)
        if self.calibration > images:
            raise OptionError(f"--calibration {self.calibration}: {dataset} has {images} training images")
        return self.calibration

    def fine_tunings(self) -> dict[str, int]:
        """The variants that are fine-tuned, with the number of clusters of each. 0 means no clustering."""
        needs = {name: NEEDS.get(name, ()) for name in self.asked()}
        return {name: (self.clusters or 0) * ("clusters" in flags) for name, flags in needs.items() if "qat" in flags}


def parser(description: str | None = None) -> Parser:
    """The parser of ``cnnopt.quantize``. ``description`` is the first text that ``--help`` prints."""
    listing, others = (
        "\n".join(f"  {name:<20}{text}" for name, text in known.items()) for known in (VARIANTS, FORMATS)
    )
    made = Parser(
        prog="python -m cnnopt.quantize",
        description=description,
        epilog=f"variants:\n{listing}\n\nother formats, only if named:\n{others}",
    )
    made.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    made.add_argument("--variants", metavar="A,B", help="which files to make [all .tflite that apply]")
    made.add_argument(
        "--clusters",
        type=int,
        metavar="N",
        help=f"make clustered-int8 with N values a kernel, {CLUSTERS[0]} to {CLUSTERS[-1]}, such as 16",
    )
    made.add_argument(
        "--qat",
        type=int,
        metavar="EPOCHS",
        help="make int8-qat: fine-tune for int8, zeros held, on all ranks; "
        "with --clusters also clustered-int8-qat, by a second fine-tuning",
    )
    made.add_argument("--baseline", type=Path, metavar="RUN", help="a dense run to compare with")
    made.add_argument(
        "--calibration",
        type=int,
        metavar="N",
        help=f"training images for int8, at least {MIN_CALIBRATION} [{CALIBRATION}, or all if fewer]",
    )
    made.add_argument("--seed", type=int, default=0, help="seed that picks the calibration images [0]")
    made.add_argument("--data-dir", metavar="DIR", help="folder that holds the data set")
    made.add_argument("--pack", action="store_true", help="also pack the int8 files (lossless, near their entropy)")
    made.add_argument(
        "--runtime", choices=RUNTIMES, default="tf", help="interpreter that measures: TensorFlow's or LiteRT's [tf]"
    )
    return made


def parse_args(argv: Sequence[str], description: str | None = None) -> Options:
    """The options of a command line. ``description`` is the first text that ``--help`` prints.

    Raises UserError; SystemExit(0) for ``--help``.
    """
    given = vars(parser(description).parse_args(argv))
    given["formats"] = ()
    if given["variants"] is not None:
        names = tuple(dict.fromkeys(name.strip() for name in given["variants"].split(",")))
        known = [*VARIANTS, *FORMATS]
        for name in names:
            if name not in known:
                near = nearest(name, known)
                raise OptionError(f"--variants {name}: choose from {', '.join(known)}{near and f': {near}'}")
        given["variants"] = tuple(name for name in names if name in VARIANTS)
        given["formats"] = tuple(name for name in names if name in FORMATS)
        for flag in ("clusters", "qat"):
            users = [name for name, flags in NEEDS.items() if flag in flags]
            named = [name for name in users if name in given["variants"]]
            if named and given[flag] is None:
                raise OptionError(f"--variants {named[0]}: give --{flag} N too, or leave it out")
            if not named and given[flag] is not None:
                raise OptionError(
                    f"--{flag} {given[flag]} is for {' and '.join(users)}: add one to --variants, or leave --{flag} out"
                )
    if given["clusters"] is not None and given["clusters"] not in CLUSTERS:
        raise OptionError(
            f"--clusters {given['clusters']}: give {CLUSTERS[0]} to {CLUSTERS[-1]}; 16 is 4 bits a weight at most"
        )
    if given["qat"] is not None and given["qat"] < 1:
        raise OptionError(f"--qat {given['qat']}: give 1 epoch or more")
    if given["calibration"] is not None and given["calibration"] < MIN_CALIBRATION:
        raise OptionError(
            f"--calibration {given['calibration']}: too few images to see the range of the activations; "
            f"give at least {MIN_CALIBRATION}"
        )
    if given["seed"] < 0:
        raise OptionError(f"--seed {given['seed']}: must be 0 or more")
    return Options(**given)


def choose(options: Options, sparsity: float) -> tuple[str, ...]:
    """The variants to make from a run with this sparsity. Raises OptionError if one of them cannot be made from it."""
    # With a smaller share of zeros, the converter leaves a kernel dense (measured: docs/quantize.md, "Variants").
    sparse_enough = sparsity >= 0.4
    if options.variants is None:
        return tuple(name for name in options.asked() if sparse_enough or not name.startswith("sparse-"))
    for name in options.variants:
        if name.startswith("sparse-") and not sparse_enough:
            raise OptionError(
                f"--variants {name}: {sparsity:.0%} of the weights of {options.run} are zero; leave it out"
            )
    return options.variants
