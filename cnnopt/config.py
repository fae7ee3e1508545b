"""The settings of a run: one frozen dataclass, and the command line made from its fields.

This module uses the standard library only. So ``--help`` and mistakes on the command line are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from cnnopt.command_line import Parser
from cnnopt.errors import UserError
from cnnopt.presets import PRESETS, STUDY, SUMMARIES
from cnnopt.schedules import Timeline, parse_drops, parse_duration


class ConfigError(UserError):
    """A setting is invalid. The message is one line that names the flag and the remedy."""


#: Longest run in steps; more is taken for a typing error. All learning rates are computed before the first step.
MOST_STEPS = 10**7
#: Deeper networks are refused. Keras 2 builds a network with nested calls, one level for each layer. It builds 560
#: layers in half a minute on two cores. 1,202 layers, the deepest of He et al. 2016, end in a RecursionError. With a
#: higher recursion limit, those 1,202 layers had not taken their first step after five minutes, in 6 GB.
MOST_LAYERS = 560
#: Largest learning rate and weight decay. float32 holds them, also after the learning rate has grown with the batch.
LARGEST = 1e30
#: Longest file name on the usual file systems, in bytes.
NAME_MAX = 255


def _flag(
    default: Any, help: str, *, identity: bool = True, before: Any = dataclasses.MISSING, group: str | None = None
) -> Any:
    """Make a field with its help text. ``identity`` is False if a resumed run may change the field.

    ``before`` is the value for runs that were stored before the field existed; without it, ``default`` is used.
    ``group`` is the heading in ``--help`` of this field and of those after it.
    """
    before = default if before is dataclasses.MISSING else before
    return field(default=default, metadata={"help": help, "identity": identity, "before": before, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. The field ``base_lr`` is the flag ``--base-lr``, and so on."""

    dataset: Literal["cifar10", "cifar100", "digits", "synthetic"] = _flag("cifar10", "images to learn", group="data")
    data_dir: str | None = _flag(
        None,
        "folder that holds the data set; else $CNNOPT_DATA_DIR, else ~/.keras/datasets, with a download if missing",
        identity=False,
    )
    validation: int = _flag(
        0, "training images to hold out, equally from each class; choices are made on them, not on the test images"
    )
    augment: Literal["none", "standard", "shift"] = _flag(
        "standard", "standard: crop from 4 reflected pixels and alternating flip; shift: the original study's"
    )
    normalize: Literal["channel", "pixel-mean"] = _flag(
        "channel", "standardise each channel, or only subtract the mean image as the original study did"
    )

    depth: int = _flag(
        20, "layers of the CIFAR ResNet, 6n+2 from 8 to 560: 20, 32, 44, 56, 110; 8 and 14 for tests", group="network"
    )

    epochs: int = _flag(30, "passes over the training images", group="training")
    batch_size: int = _flag(128, "global batch, split over the ranks")
    optimizer: Literal["sgd", "muon", "adam"] = _flag(
        "muon", "sgd has Nesterov momentum 0.9; muon also orthogonalizes the steps of convolutions (Jordan et al. 2024)"
    )
    base_lr: float | None = _flag(
        None,
        "peak learning rate at batch 128; it grows with the batch (sgd), or with its square root (muon, adam) "
        "[sgd and muon 0.2, adam 0.001]",
    )
    lr_schedule: Literal["linear", "cosine", "step"] = _flag("linear", "shape of the learning rate after the warm-up")
    lr_drops: str = _flag(
        "", "for --lr-schedule step: when the rate drops, and to what share of the peak, such as 80e:0.1,120e:0.01"
    )
    warmup: str = _flag("5%", "linear warm-up of the learning rate, in the units of --prune-begin")
    weight_decay: float | None = _flag(
        None,
        "weight decay of the kernels: their gradients get weight_decay x weight; decoupled for muon's convolutions "
        "[muon 0.001, sgd and adam 0.0005]",
    )
    label_smoothing: float = _flag(0.0, "share of the target spread over all classes")
    ema: float = _flag(0.0, "decay of the moving average of the weights, which is then evaluated; 0: no average")
    seed: int = _flag(0, "seed of the initial weights, the data order, the augmentation and the validation images")
    deterministic: bool = _flag(False, "the same command on as many ranks gives the same bits; slower")

    sparsity: float = _flag(0.6, "share of all kernel weights that is zero at the end; 0: no pruning", group="pruning")
    sparsity_schedule: Literal["none", "constant", "polynomial"] = _flag(
        "polynomial",
        "constant: full sparsity from --prune-begin on; polynomial: cubic ramp until --prune-end (Zhu and Gupta 2017)",
    )
    initial_sparsity: float = _flag(0.0, "sparsity at the start of the polynomial ramp")
    prune_begin: str = _flag("30%", "first mask update, as 500s (steps), 2e (epochs) or 15% (of the run)")
    prune_end: str = _flag("80%", "last mask update, in the same units; the masks stay fixed after it")
    prune_frequency: str = _flag("1%", "time between mask updates, in the same units")
    sparsity_scope: Literal["uniform", "global"] = _flag(
        "global",
        "global: prune the smallest weights of the whole network; uniform: prune the same share of each kernel",
    )

    precision: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "auto",
        "compute type; auto: float16 on a GPU, bfloat16 on a CPU with instructions for it, else float32",
        group="precision",
    )

    exchange: Literal["auto", "dense", "sparse"] = _flag(
        "auto",
        "send all gradients, or those of the kept weights only; auto measures at the start which is faster",
        identity=False,
        group="exchange",
    )
    wire_dtype: Literal["float32", "bfloat16", "float16"] = _flag(
        "float32",
        "type of the gradients on the network; 16 bits halve the bytes, and float16 adds a loss scale",
        before="float32",
    )

    compile: Literal["auto", "on", "off"] = _flag(
        "auto", "let XLA compile the step and the evaluation; auto: on a GPU, not on CPUs", identity=False, group="step"
    )
    stream: Literal["auto", "host", "device"] = _flag(
        "auto",
        "make the batches on the device, which then holds all images, or on the host; both make the same batches; "
        "auto: on the device if it is a GPU",
        identity=False,
    )
    steps_per_call: str = _flag(
        "auto",
        "steps between checks for signals; auto: half a second of steps on a GPU, 1 step on CPUs",
        identity=False,
    )

    run_dir: str = _flag("runs", "folder of all runs", identity=False, group="saving")
    name: str | None = _flag(
        None,
        "folder of this run below --run-dir [data set, depth, schedule, sparsity, precision, seed]",
        identity=False,
    )
    resume: str = _flag(
        "auto",
        "auto: go on from the newest good checkpoint of this run; never: refuse to go on; or a checkpoint folder, from "
        "which the first start begins",
        identity=False,
    )
    save_every: str = _flag(
        "1e", "time between checkpoints, as 1e (epochs), 500s (steps) or 10m (minutes)", identity=False
    )
    keep: int = _flag(3, "number of newest checkpoints to keep, besides the best", identity=False)
    strict_save: bool = _flag(False, "stop when a checkpoint cannot be written", identity=False)

    expect_ranks: int | None = _flag(None, "fail unless this many ranks have started", identity=False, group="running")
    share_gpus: bool = _flag(False, "let several ranks share a GPU, for tests", identity=False)
    quantize: bool = _flag(False, "when done, export, quantize and measure the run (docs/quantize.md)", identity=False)
    verbose: bool = _flag(False, "show TensorFlow's and Horovod's own messages", identity=False)

    def __post_init__(self) -> None:
        """Set the fields that depend on other fields, then refuse invalid settings."""
        # A shell expands ~ in --resume ~/path, but not in --resume=~/path.
        object.__setattr__(self, "resume", os.path.expanduser(self.resume))
        if self.sparsity_schedule == "none" or self.sparsity == 0:
            object.__setattr__(self, "sparsity_schedule", "none")
            object.__setattr__(self, "sparsity", 0.0)
        if self.base_lr is None:
            object.__setattr__(self, "base_lr", 1e-3 if self.optimizer == "adam" else 0.2)
        if self.weight_decay is None:
            object.__setattr__(self, "weight_decay", 1e-3 if self.optimizer == "muon" else 5e-4)
        _validate(self)
        if self.name is None:
            object.__setattr__(self, "name", self._default_name())

    def _default_name(self) -> str:
        pruned = f"-{self.sparsity_schedule}{self.sparsity * 100:g}" if self.sparsity else "-dense"
        return f"{self.dataset}-resnet{self.depth}{pruned}-{self.precision}-seed{self.seed}"

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result. A run can be resumed only if they are equal."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["identity"]}

    def peak_rate(self) -> float:
        """The peak learning rate for this batch size: ``base_lr`` times a factor.

        For SGD the factor is batch / 128 (Goyal et al. 2017, section 2.1), for the others its square root. Adam, and
        Muon on kernels, take steps of one size for any gradient. So a larger batch makes a step less noisy, not longer
        (the square root rule of Malladi et al. 2022, arXiv:2205.10287, without its part for betas).
        """
        assert self.base_lr is not None
        batches = self.batch_size / 128
        return self.base_lr * (batches if self.optimizer == "sgd" else math.sqrt(batches))

    def compiles(self, *, gpu: bool) -> bool:
        """Whether XLA compiles the step. ``gpu``: whether this rank computes on a GPU."""
        return self.compile == "on" or (self.compile == "auto" and gpu)

    def resident(self, *, gpu: bool) -> bool:
        """Whether all images stay on the device."""
        return self.stream == "device" or (self.stream == "auto" and gpu)

    def call_length(self, *, gpu: bool) -> int | None:
        """The number of steps of a call; None if it is measured."""
        if self.steps_per_call == "auto":
            return None if gpu else 1
        return int(self.steps_per_call)

    def check_ranks(self, ranks: int) -> None:
        """Raise ConfigError if the number of ranks is not the expected one, or does not divide the batch."""
        if self.expect_ranks not in (None, ranks):
            raise ConfigError(
                f"--expect-ranks {self.expect_ranks}: {ranks} started; check -np, --ntasks or the worker replicas"
            )
        if self.batch_size % ranks:
            below = self.batch_size // ranks * ranks
            sizes = f"{below} or {below + ranks}" if below else f"{ranks}"
            raise ConfigError(f"--batch-size {self.batch_size}: cannot be split evenly over {ranks} ranks; use {sizes}")

    def check_timeline(self, timeline: Timeline, ranks: int = 1) -> None:
        """Raise ConfigError if there are fewer training images than a batch has, or the schedules do not fit the run.

        A schedule does not fit if the masks, the warm-up or a drop of the learning rate come after the end of the run,
        or if the mask updates would end before they begin.
        """
        images = timeline.num_images + self.validation
        if timeline.batch_size > images:
            raise ConfigError(
                f"--batch-size {self.batch_size}: {self.dataset} has {images:,} training images; use at most "
                f"{images // ranks * ranks}"
            )
        if timeline.batch_size > timeline.num_images:
            raise ConfigError(
                f"--validation {self.validation}: leaves {max(timeline.num_images, 0):,} of {images:,} training "
                f"images, fewer than a batch of {self.batch_size}; use at most {images - self.batch_size}"
            )
        if timeline.total_steps > MOST_STEPS:
            raise ConfigError(
                f"--epochs {self.epochs}: {timeline.total_steps:,} steps; a run can have {MOST_STEPS:,}, so use at "
                f"most {MOST_STEPS * timeline.batch_size // timeline.num_images} epochs"
            )
        begin, end = (timeline.steps(parse_duration(d)) for d in (self.prune_begin, self.prune_end))
        if self.sparsity and not begin <= end <= timeline.total_steps:
            raise ConfigError(
                f"--prune-begin {self.prune_begin} --prune-end {self.prune_end}: steps {begin} to {end} of "
                f"{timeline.total_steps}; let pruning end after it begins and by the end of the run"
            )
        if (steps := timeline.steps(parse_duration(self.warmup))) > timeline.total_steps:
            raise ConfigError(
                f"--warmup {self.warmup}: {steps} steps, but the run has {timeline.total_steps}; give a shorter one, "
                "or a share of the run such as 5%"
            )
        for when, _ in parse_drops(self.lr_drops):
            if timeline.steps(when) >= timeline.total_steps:
                raise ConfigError(
                    f"--lr-drops {self.lr_drops}: {when} is not before the end of the run, of {self.epochs} epochs; "
                    "give drops within it, or shares of it such as 50%:0.1,75%:0.01"
                )

    def difference(self, identity: dict[str, Any]) -> str | None:
        """The fields in which a stored ``identity()`` differs from this one, as text. None if all are equal."""
        stored, mine = completed(identity), self.identity()
        differing = [
            f"--{name.replace('_', '-')} was {stored[name]}, is {mine.get(name, 'not known to this version of cnnopt')}"
            for name in [*mine, *(stored.keys() - mine.keys())]
            if name not in mine or stored[name] != mine[name]
        ]
        return ", ".join(differing) or None


def completed(identity: dict[str, Any]) -> dict[str, Any]:
    """A stored ``TrainConfig.identity()``, completed with the settings that were added to cnnopt later."""
    fields = [f for f in dataclasses.fields(TrainConfig) if f.metadata["identity"]]
    return {**{f.name: f.metadata["before"] for f in fields if f.name not in identity}, **identity}


def _validate(config: TrainConfig) -> None:
    """Raise ConfigError for the first invalid setting."""

    def refuse(flag: str, remedy: str) -> NoReturn:
        raise ConfigError(f"--{flag.replace('_', '-')} {getattr(config, flag)}: {remedy}")

    for name, choices in _choices().items():
        if getattr(config, name) not in choices:
            refuse(name, f"choose from {', '.join(choices)}")
    if config.depth < 8 or (config.depth - 2) % 6:
        nearest = 6 * max(1, round((config.depth - 2) / 6)) + 2
        refuse("depth", f"the depth of a CIFAR ResNet is 6n+2; the nearest is {nearest}")
    if config.depth > MOST_LAYERS:
        refuse("depth", f"Keras cannot build a network of so many layers; use at most {MOST_LAYERS}")
    for name in ("sparsity", "initial_sparsity", "label_smoothing", "ema"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            share = f"; {value:g}% is {value / 100:g}" if 1 < value < 100 else ""
            refuse(name, f"must be at least 0 and below 1{share}")
    if config.sparsity_schedule == "polynomial" and config.initial_sparsity > config.sparsity:
        refuse("initial_sparsity", f"must not exceed --sparsity {config.sparsity:g}")
    for name in ("batch_size", "epochs", "keep", "expect_ranks"):
        value = getattr(config, name)
        if value is not None and value < 1:
            refuse(name, "must be at least 1")
    if config.steps_per_call != "auto" and not re.fullmatch("[1-9][0-9]{0,5}", config.steps_per_call):
        refuse("steps_per_call", "auto, or a number of steps")
    if config.validation < 0:
        refuse("validation", "must be 0 or more")
    if not 0 <= config.seed < 2**32:
        refuse("seed", "must be 0 or more, and below 2^32")
    assert config.base_lr is not None
    assert config.weight_decay is not None
    if not 0 < config.base_lr <= LARGEST:
        refuse("base_lr", f"must be above 0, and at most {LARGEST:g}")
    if not 0 <= config.weight_decay <= LARGEST:
        refuse("weight_decay", f"must be 0 or more, and at most {LARGEST:g}")
    for name in ("prune_begin", "prune_end", "prune_frequency", "warmup"):
        try:
            parse_duration(getattr(config, name))
        except ValueError as error:
            raise ConfigError(f"--{name.replace('_', '-')}: {error}") from None
    begin, end = parse_duration(config.prune_begin), parse_duration(config.prune_end)
    if config.sparsity and begin.unit == end.unit and begin.value > end.value:
        refuse("prune_begin", f"must not be after --prune-end {config.prune_end}; give both flags")
    try:
        every = parse_duration(config.save_every, allowed="esm")
    except ValueError as error:
        raise ConfigError(f"--save-every: {error}") from None
    if not every.value:
        refuse("save_every", "must be above 0")
    if every.unit != "m" and every.value % 1:
        refuse("save_every", "give whole epochs or steps; steps (s) or minutes (m) for parts of an epoch")
    try:
        drops = parse_drops(config.lr_drops)
    except ValueError as error:
        raise ConfigError(f"--lr-drops: {error}") from None
    if bool(drops) != (config.lr_schedule == "step"):
        raise ConfigError("--lr-drops and --lr-schedule step go together: give both or neither")
    if config.name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", config.name):
        refuse("name", "use letters, digits, '.', '_', '+' and '-' only; --run-dir is the place for a path")
    if config.name is not None and len(config.name) > NAME_MAX:
        raise ConfigError(f"--name {config.name[:20]}...: {len(config.name)} characters; use at most {NAME_MAX}")


def _choices() -> dict[str, tuple[str, ...]]:
    hints = typing.get_type_hints(TrainConfig)
    return {name: typing.get_args(t) for name, t in hints.items() if typing.get_origin(t) is Literal}


def parser() -> Parser:
    """The parser of train_hvd.py, made from the fields of TrainConfig."""
    made = Parser(
        prog="train_hvd.py",
        usage="%(prog)s [--preset NAME] [FLAG ...]",
        description="Train a pruned, mixed-precision CIFAR ResNet synchronously over all ranks of the launcher. "
        "The default of a flag is in brackets.",
        epilog="presets:\n"
        + "".join(f"  {name:<21}{summary}\n" for name, summary in SUMMARIES.items())
        + "\nexample:\n  python -m cnnopt.launch -np 2 -- python train_hvd.py --depth 44 --sparsity 0.6",
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument(
        "--preset", choices=PRESETS, metavar="NAME", help="a named set of flags, listed below; other flags override it"
    )
    hints = typing.get_type_hints(TrainConfig)
    for f in dataclasses.fields(TrainConfig):
        kind = hints[f.name]
        text = f.metadata["help"]
        if f.default not in (None, ""):
            text += f" [{f.default}]" if kind is not bool else " [no]"
        options: dict[str, Any] = {"help": text.replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        else:
            members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
            options["type"] = members[0]
            options["metavar"] = "DIR" if f.name.endswith("_dir") else {int: "N", float: "X", str: "TEXT"}[members[0]]
        if f.metadata["group"]:
            group = made.add_argument_group(f.metadata["group"])
        group.add_argument(f"--{f.name.replace('_', '-')}", **options)
    return made


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """Read the configuration from a command line.

    Raises UserError with a one-line message. For ``--help``, prints the help text and raises SystemExit(0).
    """
    given = vars(parser().parse_args(argv))
    chosen = given.pop("preset", None)
    preset = dict(PRESETS[chosen]) if chosen else {}
    # A dense preset sets both --sparsity and --sparsity-schedule. One of the two flags overrides both settings.
    if given.get("sparsity") and preset.get("sparsity_schedule") == "none":
        del preset["sparsity_schedule"]
    if given.get("sparsity_schedule", "none") != "none" and preset.get("sparsity") == 0:
        del preset["sparsity"]
    if given.get("sparsity") and given.get("sparsity_schedule") == "none":
        raise ConfigError(
            f"--sparsity {given['sparsity']:g}: prunes, but --sparsity-schedule none does not; leave one out"
        )
    config = TrainConfig(**{**preset, **given})
    if chosen in STUDY and "name" not in given:
        # The study presets differ from the others in settings that the default name does not contain.
        return dataclasses.replace(config, name=f"study-{config.name}")
    return config
