#!/usr/bin/env python
"""Speed on one GPU, beside PyTorch and JAX on the same card. One process at a time has the GPU.

"epochs" are whole epochs of train_hvd.py, on 50,000 made-up images or on --data-dir's. "step" is the program's step on
one resident batch; on a GPU it is compiled, and a call has many steps. It has Muon, the default, or SGD, as the others
have; both with 60% zeros. PyTorch trains eager, by torch.compile, and as a CUDA graph; JAX runs its steps in one
compiled loop. Each row is the median of several blocks of steps. The first step, with what it compiles, is measured
apart. A second table has what our step spends on the GPU, from TensorFlow's profiler. --device cpu --quick tries all of
this in a minute on any machine.

    .venv/bin/python benchmarks/gpu.py --torch-python python3 --jax-python python3 --out gpu.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hosts import start
from side_by_side import ROOT, Contestant, median_and_spread, open_log, report, table
from startup import to_first_step

from cnnopt.data.cifar_files import LAYOUTS
from cnnopt.distributed import host

WORKERS = "benchmarks/workers"
#: Depth and batch of each network, the most important first; and those that --all adds.
NETWORKS = [(44, 128), (20, 128), (44, 1024), (20, 1024)]
MORE_NETWORKS = [(44, 512), (20, 512)]
QUICK = [(8, 64)]
#: Depth and epochs of the runs to their end, with --data-dir.
TO_THE_END = [(20, 30), (44, 40)]
GRAPH = "PyTorch, CUDA graph"


@dataclass(frozen=True)
class Trainer:
    """One row of the table for each network: the program that trains, and how it is asked."""

    name: str
    command: tuple[str, ...]
    request: Mapping[str, Any] = field(default_factory=dict)
    #: The module without which it is left out, and the option that gives a Python which has it.
    needs: str | None = None
    needs_gpu: bool = False
    #: Measured for the first network only, unless --all is given.
    slow: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this program."""
        return self.needs is None


EPOCHS = Trainer("cnnopt, epochs", ("train_hvd.py",))
OURS = f"{WORKERS}/ours.py"
TRAINERS = [
    EPOCHS,
    Trainer("cnnopt, step, Muon", (OURS,), {"optimizer": "muon", "resident": True}),
    Trainer("cnnopt, step, SGD", (OURS,), {"optimizer": "sgd", "resident": True}),
    Trainer(GRAPH, (f"{WORKERS}/torch_gpu.py", "graph"), needs="torch", needs_gpu=True),
    Trainer("PyTorch, eager", (f"{WORKERS}/torch_gpu.py", "eager"), needs="torch", slow=True),
    Trainer("JAX", (f"{WORKERS}/jax_gpu.py",), needs="jax", slow=True),
    Trainer("PyTorch, torch.compile", (f"{WORKERS}/torch_gpu.py", "compile"), needs="torch", slow=True),
]
SHARED = [
    Trainer(f"cnnopt, step, SGD, {kind} exchange", (OURS,), {"exchange": kind, "resident": True})
    for kind in ("dense", "sparse")
]


@dataclass
class Row:
    """What one trainer has made of one network: seconds a step of each block, or the reason why there are none."""

    trainer: str
    depth: int
    batch: int
    precision: str
    seconds: list[float] = field(default_factory=list)
    #: From the start of the process to the end of the first step, with all that is imported, traced and compiled.
    first_seconds: float | None = None
    peak_bytes: int | None = None
    spent: dict[str, float] | None = None
    version: str | None = None
    why: str = ""

    @property
    def speed(self) -> float:
        """Images a second, the median."""
        return self.batch / statistics.median(self.seconds)


class Measurement:
    """The settings of one call of this program."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.end = time.monotonic() + 60 * args.minutes
        self.pythons = {"torch": args.torch_python, "jax": args.jax_python}
        # Nothing that an earlier run has compiled: neither XLA's cache nor the driver's.
        self.caches = {"XDG_CACHE_HOME": str(scratch / "cache"), "CUDA_CACHE_PATH": str(scratch / "cuda")}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        self.devices = {"CUDA_VISIBLE_DEVICES": "" if args.device == "cpu" else visible}
        self.missing = {name: None if self._has(name) else f"{name} is not installed" for name in self.pythons}

    def environment(self, trainer: Trainer) -> dict[str, str]:
        """The variables of a trainer's process, beside those of this one."""
        given = {**self.caches, **self.devices}
        path = f"{ROOT}:{ROOT / 'benchmarks'}"
        if trainer.ours:
            return {**given, "PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")}
        if self.pythons[trainer.needs or ""]:
            # Another environment must not find this one's packages and CUDA libraries.
            return {**given, "PYTHONPATH": path, "LD_LIBRARY_PATH": ""}
        return {**given, "PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")}

    def _has(self, package: str) -> bool:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        with contextlib.suppress(OSError):
            return not subprocess.run([self.pythons[package] or sys.executable, "-c", code]).returncode
        return False

    def row(self, trainer: Trainer, depth: int, batch: int, precision: str, *, ranks: int = 1) -> Row:
        """Measure, or say why not."""
        row = Row(trainer.name, depth, batch * ranks, precision)
        left = self.end - time.monotonic()
        if trainer.needs and self.missing[trainer.needs]:
            row.why = f"{self.missing[trainer.needs]}"
        elif trainer.needs_gpu and self.args.device == "cpu":
            row.why = "needs a GPU"
        elif left < 5:
            row.why = f"no time left of --minutes {self.args.minutes:g}"
        else:
            try:
                measure = self._epochs if trainer is EPOCHS else self._steps
                measure(row, trainer, ranks, min(left, self.args.patience))
            except RuntimeError as error:
                row.why = str(error)
        print(f"  {describe(row)}", file=sys.stderr)
        return row

    def _steps(self, row: Row, trainer: Trainer, ranks: int, patience: float) -> None:
        worker, *mode = trainer.command
        shared = {"ONE_GPU": "1"} if ranks > 1 and self.args.device == "gpu" else {}
        contestant = start(
            f"gpu-{row.trainer}-{row.depth}-{row.batch}".replace(" ", "").replace(",", "-"),
            [worker, str(row.depth), str(row.batch // ranks), row.precision, *mode],
            ranks,
            horovod=trainer.ours,
            pinned=False,
            python=self.pythons.get(trainer.needs or "") or sys.executable,
            environment={**self.environment(trainer), **shared},
        )
        with contestant as running, limited(running, patience):
            begun = time.perf_counter()
            running.ask(**trainer.request, steps=1)
            row.first_seconds = time.perf_counter() - begun
            steps = 2
            if not self.args.quick:
                # Long enough that starting a block does not count, and what compiles in the second call is done.
                running.ask(**trainer.request, steps=20)
                slowest = max(a["seconds"] for a in running.ask(**trainer.request, steps=20))
                steps = max(20, round(0.5 * 20 / slowest))
            for _ in range(self.args.rounds):
                answers = running.ask(**trainer.request, steps=steps)
                row.seconds.append(max(answer["seconds"] for answer in answers) / steps)
            row.peak_bytes, row.version = answers[0]["peak_bytes"], answers[0].get("version")
            if "library" in answers[0] and ranks > 1:
                row.trainer += f", {answers[0]['library']}"
            if trainer.ours and self.args.device == "gpu":
                row.spent = running.ask(**trainer.request, steps=20, profile=True)[0]["spent"]

    def flags(self, depth: int, batch: int, precision: str) -> list[str]:
        """Of train_hvd.py: a run of which every epoch after the first counts."""
        data = ["--dataset", "synthetic"] if self.args.quick else ["--data-dir", str(self.data())]
        size = ["--depth", str(depth), "--batch-size", str(batch), "--precision", precision]
        return [*data, *size, "--epochs", "2" if self.args.quick else "4"]

    def data(self) -> Path:
        """--data-dir, or a folder with made-up images of CIFAR-10's number and layout."""
        if self.args.data_dir:
            return Path(self.args.data_dir)
        layout = LAYOUTS["cifar10"][1]
        folder = self.scratch / "data" / layout.folder
        if not folder.exists():
            folder.mkdir(parents=True)
            draw = np.random.default_rng(0)
            for file in (*layout.train, layout.test):
                records = draw.integers(0, 256, (layout.images_per_file, layout.record), np.uint8)
                records[:, 0] %= layout.num_classes
                records.tofile(folder / file)
            (folder / layout.names).write_text("".join(f"class {i}\n" for i in range(layout.num_classes)))
        return folder.parent

    def train(self, name: str, flags: list[str], patience: float) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of a run of train_hvd.py."""
        command = [sys.executable, "train_hvd.py", *flags, "--run-dir", str(self.scratch / "runs"), "--name", name]
        with open_log(f"gpu-{name}", 0) as log:
            try:
                environment = {**os.environ, **self.environment(EPOCHS)}
                done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=patience)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"not done after {patience:.0f} s") from None
        if done.returncode:
            raise RuntimeError(f"train_hvd.py has ended with {done.returncode}; see {os.path.relpath(log.name)}")
        lines = (self.scratch / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def _epochs(self, row: Row, trainer: Trainer, ranks: int, patience: float) -> None:
        name = f"epochs-{row.depth}-{row.batch}-{row.precision}"
        lines = self.train(name, self.flags(row.depth, row.batch, row.precision), patience)
        row.seconds = [line["step_seconds"] for line in lines[1:]]

    def first_steps(self, depth: int, batch: int, precision: str) -> dict[str, float | str]:
        """Seconds from the shell to the first step of train_hvd.py and its checkpoint, first with empty caches."""
        command = ["env", *(f"{name}={value}" for name, value in self.environment(EPOCHS).items())]
        command += [sys.executable, "train_hvd.py"]
        flags = [*self.flags(depth, batch, precision), "--save-every", "1s", "--name", "startup"]
        found: dict[str, float | str] = {}
        for caches in ("empty",) if self.args.quick else ("empty", "warm"):
            patience = min(self.args.patience, self.end - time.monotonic())
            try:
                found[caches] = to_first_step(f"gpu-{caches}", command, flags, patience=patience)
            except RuntimeError as error:
                found[caches] = str(error)
            print(f"  first step, caches {caches}: {found[caches]}", file=sys.stderr)
        return found

    def to_the_end(self, depth: int, epochs: int, precision: str) -> dict[str, Any]:
        """A run with 60% zeros on --data-dir: its wall time, the seconds of its epochs, and its last line."""
        flags = ["--data-dir", str(self.data()), "--depth", str(depth), "--epochs", str(epochs)]
        begun = time.monotonic()
        try:
            lines = self.train(f"end-{depth}", [*flags, "--precision", precision], self.end - begun)
        except RuntimeError as error:
            return {"depth": depth, "epochs": epochs, "why": str(error)}
        wall, training = time.monotonic() - begun, sum(line["seconds"] for line in lines)
        return {"depth": depth, "epochs": epochs, "wall_seconds": wall, "epoch_seconds": training, "last": lines[-1]}


@contextlib.contextmanager
def limited(contestant: Contestant, seconds: float) -> Iterator[None]:
    """End the contestant after so many seconds. What is asked of it then raises RuntimeError."""
    ended = threading.Event()

    def end() -> None:
        ended.set()
        contestant.end()

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"not done after {seconds:.0f} s" if ended.is_set() else str(error)) from None
    finally:
        timer.cancel()


def describe(row: Row) -> str:
    """One line about a row, for the eye."""
    found = row.why or f"{row.speed:.0f} images/s, {1e3 * statistics.median(row.seconds):.2f} ms a step"
    return f"ResNet-{row.depth}, batch {row.batch}, {row.precision}, {row.trainer}: {found}"


def speeds(rows: list[Row]) -> str:
    """The table of speeds."""
    cells = []
    for row in rows:
        network = [f"ResNet-{row.depth}", row.batch, row.precision, row.trainer]
        if row.why:
            cells.append([*network, f"not measured: {row.why}", "", "", "", "", ""])
            continue
        peers = [
            r for r in rows if (r.depth, r.batch, r.precision) == (row.depth, row.batch, row.precision) and r.seconds
        ]
        graph = next((f"{row.speed / r.speed:.2f}" for r in peers if r.trainer == GRAPH), "")
        # The loop of the program beside the step that it calls, with the same optimizer.
        bare = next((r.speed for r in peers if r.trainer == "cnnopt, step, Muon"), None)
        middle, spread = median_and_spread(row.seconds)
        cells.append([
            *network, f"{row.speed:.0f} ±{spread:.0%}", f"{1e3 * middle:.2f}", graph,
            f"{row.speed / bare:.2f}" if bare and row.trainer == EPOCHS.name else "",
            "" if row.first_seconds is None else f"{row.first_seconds:.1f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        ])  # fmt: skip
    heads = ["network", "batch", "type", "trainer", "images/s", "ms a step", "of the CUDA graph", "of the bare step",
             "start to first step, s", "peak MiB"]  # fmt: skip
    return table(heads, cells)


def spendings(rows: list[Row]) -> str:
    """The table of what our steps spend on the GPU. Empty without one."""
    cells = [
        [f"ResNet-{row.depth}", row.batch, row.precision, row.trainer, f"{row.spent['launches']:.0f}",
         f"{row.spent['copies']:.0f}", f"{1e3 * row.spent['kernels']:.3f}", f"{1e3 * row.spent['gaps']:.3f}"]
        for row in rows if row.spent
    ]  # fmt: skip
    heads = ["network", "batch", "type", "trainer", "kernels launched", "copies", "ms in kernels", "ms idle"]
    return "\n\n" + table(heads, cells) if cells else ""


def gpu() -> str | None:
    """Name and driver of the GPUs of this host, as nvidia-smi gives them."""
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
    return None


def arguments() -> argparse.Namespace:
    """The command line. Ends with status 2 where there is no GPU and none is wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny network and few steps, to see that all of it works"
    )
    parser.add_argument(
        "--all", action="store_true", help="every trainer for every network, batch 512 and bfloat16 too"
    )
    parser.add_argument("--ranks", type=int, default=1, help="2: ours alone, with so many ranks on the one GPU")
    parser.add_argument("--torch-python", help="a Python that has PyTorch [this one]")
    parser.add_argument("--jax-python", help="a Python that has JAX [this one]")
    parser.add_argument("--data-dir", help="CIFAR-10; adds two runs to their end [made-up images]")
    parser.add_argument("--rounds", type=int, help="blocks that count [5, with --quick 3]")
    parser.add_argument("--minutes", type=float, help="what has not begun by then is left out [6, with --all 45]")
    parser.add_argument("--patience", type=float, default=180, help="seconds after which a trainer is given up")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 5)
    args.minutes = args.minutes or (45 if args.all else 6)
    if args.device == "gpu" and not host.has_gpu():
        parser.error("no NVIDIA driver here, or CUDA_VISIBLE_DEVICES hides the GPUs; --device cpu --quick needs none")
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu measures nothing of use and takes hours: add --quick")
    return args


def main() -> int:
    """Measure, print the tables, write every figure. Returns 1 if this program could not be measured, else 0."""
    args = arguments()
    networks = QUICK if args.quick else NETWORKS + (MORE_NETWORKS if args.all else [])
    precisions = ["float32"] if args.device == "cpu" else ["float16", "bfloat16"] if args.all else ["float16"]
    rows: list[Row] = []
    first: dict[str, float | str] = {}
    ends: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        measurement = Measurement(args, Path(scratch))
        if args.ranks == 1:
            first = measurement.first_steps(*networks[0], precisions[0])
        for precision in precisions:
            for depth, batch in networks:
                most = args.all or (depth, batch) == networks[0]
                chosen = SHARED if args.ranks > 1 else [t for t in TRAINERS if most or not t.slow]
                rows += [measurement.row(trainer, depth, batch, precision, ranks=args.ranks) for trainer in chosen]
        if args.data_dir and args.ranks == 1:
            ends = [measurement.to_the_end(depth, epochs, precisions[0]) for depth, epochs in TO_THE_END]
    text = speeds(rows) + spendings(rows)
    if first:
        depth, batch = networks[0]
        found = ", ".join(
            f"{f'{s:.1f} s' if isinstance(s, float) else s} with {caches} caches" for caches, s in first.items()
        )
        text += f"\n\nFrom the shell to the first step of ResNet-{depth}, batch {batch}, and its checkpoint: {found}"
    for run in ends:
        text += f"\n\nResNet-{run['depth']}, {run['epochs']} epochs, 60% zeros: "
        text += run.get("why") or (
            f"{run['wall_seconds']:.1f} s from the shell to the end, {run['epoch_seconds']:.1f} s in the epochs; "
            + ", ".join(f"{name} {value:.4f}" for name, value in run["last"].items() if "accuracy" in name)
        )
    where = gpu() if args.device == "gpu" else None
    content = {
        "device": args.device,
        "gpu": where,
        "rows": [vars(row) for row in rows],
        "first_step": first,
        "ends": ends,
    }
    report(args.out, f"{text}\n\n{where or 'no GPU'}", content)
    return int(any(row.why for row in rows if row.trainer.startswith("cnnopt")))


if __name__ == "__main__":
    sys.exit(main())
