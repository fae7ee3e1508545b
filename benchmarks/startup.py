#!/usr/bin/env python
"""Seconds from the shell to the end of the first step, of one rank and of two, by each launcher.

The first step ends when its checkpoint is there (--save-every 1s), so the save is included. A launcher adds the
difference to `one process`. None can be faster than `import tensorflow`.

    .venv/bin/python benchmarks/startup.py --depth 20 --batch 64 --out startup.json
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import ROOT, arguments, median_and_spread, open_log, report, table

PYTHON = str(ROOT / ".venv/bin/python")
HOROVODRUN = str(ROOT / ".venv/bin/horovodrun")
#: Keeps Keras 3 from being imported. Our ranks set it themselves; horovodrun, which imports TensorFlow too, does not.
LEGACY = ["env", "TF_USE_LEGACY_KERAS=1"]
LAUNCHERS = {
    "one process": [PYTHON, "train_hvd.py"],
    "two ranks, cnnopt.launch": [PYTHON, "-m", "cnnopt.launch", "-np", "2", "--", PYTHON, "train_hvd.py"],
    "two ranks, horovodrun --gloo": [HOROVODRUN, "--gloo", "-np", "2", PYTHON, "train_hvd.py"],
    "the same without Keras 3": [*LEGACY, HOROVODRUN, "--gloo", "-np", "2", PYTHON, "train_hvd.py"],
    "two ranks, horovodrun": [HOROVODRUN, "-np", "2", PYTHON, "train_hvd.py"],
}


def to_first_step(name: str, command: list[str], flags: list[str], *, patience: float = 600) -> float:
    """Seconds until the checkpoint of the first step is there; all ranks are then ended.

    Raises RuntimeError if the program ends before, or has not saved after ``patience`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder, open_log(f"startup-{name.replace(' ', '-')}", 0) as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, *flags, "--run-dir", folder], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while not any(Path(folder).glob("startup/checkpoints/*/manifest.json")):
                if process.poll() is not None or time.perf_counter() - started > patience:
                    raise RuntimeError(f"{name}: no first step; see {os.path.relpath(log.name)}")
                time.sleep(0.01)
            return time.perf_counter() - started
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def main() -> None:
    """Measure, print the table, write every figure."""
    args = arguments(__doc__, blocks=False).parse_args()
    turns = {f"ResNet-{depth}, {name}": (depth, command) for depth in args.depth for name, command in LAUNCHERS.items()}
    seconds: dict[str, list[float]] = {"import tensorflow": [], **{name: [] for name in turns}}
    for number in range(args.rounds + 1):
        found = {}
        started = time.perf_counter()
        libraries = [*LEGACY, PYTHON, "-c", "import tensorflow, tf_keras"]
        subprocess.run(libraries, stderr=subprocess.DEVNULL, check=True)
        found["import tensorflow"] = time.perf_counter() - started
        for name, (depth, command) in turns.items():
            batch = args.batch * (1 if name.endswith("one process") else 2)
            flags = f"--dataset synthetic --depth {depth} --precision {args.precision} --batch-size {batch}"
            flags += " --epochs 20 --save-every 1s --name startup"
            found[name] = to_first_step(name, command, flags.split())
        print(f"  round {number}/{args.rounds}", {k: round(v, 1) for k, v in found.items()}, file=sys.stderr)
        # The first round reads files that the later ones find in memory.
        for name, value in found.items() if number else ():
            seconds[name].append(value)
    rows = []
    for name, values in seconds.items():
        middle, spread = median_and_spread(values)
        rows.append([name, f"{middle:.1f}", f"{spread:.0%}"])
    text = f"{args.batch} images a rank, {args.rounds} rounds\n\n" + table(["", "seconds", "spread"], rows)
    report(args.out, text, {"batch": args.batch, "seconds": seconds})


if __name__ == "__main__":
    sys.exit(main())
