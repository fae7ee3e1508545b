#!/usr/bin/env python
"""Accuracy at large batches by rules for the learning rate, on validation images.

    .venv/bin/python benchmarks/large_batch.py --batches 128 512 1024 --rule 0.5 --rule "1 --warmup 10%" \
        --seeds 0 1 2 --run-dir runs/large-batch --out large-batch.json -- --depth 20 --epochs 30

A rule is an exponent p and flags of train_hvd.py: the peak rate is base rate x (batch / 128)^p. The flags after ``--``
are for all runs. Each run is a folder below --run-dir. The same command goes on where it was stopped, and trains
nothing twice. The table has the accuracy of the last epoch on --validation images; test images are not shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from side_by_side import ROOT, command, machine, table

from cnnopt.config import TrainConfig, parse_args
from cnnopt.errors import UserError
from cnnopt.run.run_folder import RunFolder

PYTHON = sys.executable
#: The batch to which the others are compared: every rule has the same rate there.
USUAL = 128


@dataclasses.dataclass(frozen=True)
class Rule:
    """``text`` as it was given: the exponent, then ``flags``."""

    text: str
    exponent: float
    flags: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``0.5`` or ``1 --warmup 10%``. Raises ValueError."""
        exponent, *flags = shlex.split(text)
        return cls(text, float(exponent), tuple(flags))

    def config(self, batch: int, flags: Sequence[str]) -> TrainConfig:
        """The run of this rule with a global batch of ``batch`` images. Raises UserError."""
        given = [*flags, *self.flags, "--batch-size", str(batch)]
        usual = parse_args(given)
        assert usual.base_lr is not None
        # train_hvd.py scales --base-lr by a rule for the optimizer, which this rule replaces.
        wanted = usual.base_lr * (batch / USUAL) ** self.exponent
        rate = usual.base_lr * wanted / usual.peak_rate()
        config = parse_args([*given, "--base-lr", f"{rate:.6g}"])
        # A rule without effect at this batch has the run of the other rules.
        kind = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(self.flags)).strip("-")
        name = "-".join(filter(None, [f"batch{batch}", f"rate{wanted:.4g}", kind, f"seed{config.seed}"]))
        return dataclasses.replace(config, name=name)


def train(config: TrainConfig, flags: Sequence[str], ranks: int) -> dict[str, Any]:
    """Do the run, unless that is done, and return its result."""
    own = ["--batch-size", config.batch_size, "--base-lr", config.base_lr, "--name", config.name]
    launcher = [PYTHON, "-m", "cnnopt.launch", "-np", str(ranks), "--"] if ranks > 1 else []
    print(f"{config.name}", file=sys.stderr, flush=True)
    words = [*launcher, PYTHON, str(ROOT / "train_hvd.py"), *flags, *map(str, own)]
    if status := subprocess.run(words, stdout=sys.stderr).returncode:
        sys.exit(status)
    result = RunFolder.of(config).result()
    assert result is not None
    return result


def rows(rules: Sequence[Rule], batches: Sequence[int], found: dict[str, dict[int, list[float]]]) -> list[list[str]]:
    """A row for each rule and batch: mean and deviation over the seeds, and the difference to batch 128 in points."""
    made = []
    for rule in rules:
        usual = statistics.mean(found[rule.text].get(USUAL, [float("nan")]))
        for batch in batches:
            accuracies = found[rule.text][batch]
            mean = statistics.mean(accuracies)
            deviation = f" ±{100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
            points = f"{100 * (mean - usual):+.2f}" if usual == usual and batch != USUAL else ""
            made.append([f"`{rule.text}`", str(batch), f"{100 * mean:.2f}{deviation}", points])
    return made


def main() -> None:
    """Train, print the table, write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[USUAL, 512, 1024], help="global batch sizes")
    parser.add_argument("--rule", type=Rule.parse, action="append", required=True, metavar='"P FLAGS"')
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validation", type=int, default=5000, metavar="N", help="images held out of the training")
    parser.add_argument("-np", type=int, default=1, metavar="N", help="ranks")
    parser.add_argument("--run-dir", default="runs/large-batch", metavar="DIR")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of train_hvd.py")
    args = parser.parse_args()
    found: dict[str, dict[int, list[float]]] = {rule.text: {batch: [] for batch in args.batches} for rule in args.rule}
    runs = {}
    for seed in args.seeds:
        common = [*args.flags, "--seed", str(seed), "--validation", str(args.validation), "--run-dir", args.run_dir]
        for batch in args.batches:
            for rule in args.rule:
                try:
                    config = rule.config(batch, common)
                except UserError as error:
                    sys.exit(f"large_batch.py: --rule {rule.text!r}: {error}")
                result = train(config, [*common, *rule.flags], args.np)
                found[rule.text][batch].append(result["val_accuracy"])
                runs[config.name] = {
                    "batch": batch, "seed": seed, "peak_rate": config.peak_rate(), "flags": list(rule.flags),
                    **{name: result[name] for name in ("val_accuracy", "val_loss", "minutes", "images_per_second")},
                }  # fmt: skip
    print(table(["rule", "batch", "validation, %", "against 128"], rows(args.rule, args.batches, found)))
    print(f"\n`{command()}`; seeds {args.seeds}, {args.validation} validation images")
    if args.out is not None:
        content = {"command": command(), "machine": machine(), "accuracy": found, "runs": runs}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
