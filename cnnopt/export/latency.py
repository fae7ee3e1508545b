"""Measure the latency of .tflite files at batch 1, each time in a separate process.

    python -m cnnopt.export.latency --threads 1,2 FILE...

Prints a JSON list. The processes are separate, because peak memory belongs to a process, because a damaged file can
crash the interpreter, and because threads that TensorFlow has started would take part in the measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cnnopt.command_line import Parser, one_line, python_m
from cnnopt.distributed import host
from cnnopt.errors import CnnoptError, RunError
from cnnopt.export import tflite_file
from cnnopt.packages import RUNTIMES, choose_runtime

WARM_UP = 20


class LatencyError(RunError):
    """The measuring process failed."""


def measure(
    files: Sequence[Path], threads: Sequence[int], *, seconds: float = 2.0, runtime: str = "tf"
) -> list[list[dict[str, Any]]]:
    """A list for each file, with one dict for each number of threads. ``one`` lists the keys. Raises LatencyError.

    A new process imports the interpreter once and forks for each measurement.
    """
    command = [*python_m("cnnopt.export.latency"), "--threads", ",".join(map(str, threads))]
    command += ["--seconds", str(seconds), "--runtime", runtime, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise LatencyError(f"latency could not be measured: {last}")
    return json.loads(done.stdout)


def one(path: Path, threads: int, seconds: float, runtime: str) -> dict[str, Any]:
    """Latency of one image, in milliseconds, and memory of this process, in bytes.

    Times are for ``invoke`` alone, after ``WARM_UP`` calls, over ``seconds`` and at least 20 calls. The measurement of
    memory starts before the file is read. ``peak_rss`` is the largest resident size. ``added_rss`` is its excess
    over the size at the start, because a device would not carry the hundreds of megabytes of TensorFlow's libraries.
    """
    from cnnopt.export import interpret

    _reset_peak()
    before = _status("VmRSS")
    data = tflite_file.read(path)
    session = interpret.start(data, path, threads=threads, runtime=runtime)
    interpreter = session.interpreter
    source = interpreter.get_input_details()[0]
    pixels = np.random.default_rng(0).integers(0, 256, source["shape"], dtype=np.uint8)
    interpreter.set_tensor(source["index"], interpret.quantized(pixels, source))
    for _ in range(WARM_UP):
        interpreter.invoke()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 20 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        interpreter.invoke()
        times.append(1000 * (time.perf_counter() - start))
    peak = _status("VmHWM")
    median, p90, p99 = np.percentile(times, [50, 90, 99])
    return {
        "threads": threads,
        "runs": len(times),
        "median_ms": float(median),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "peak_rss": peak,
        "added_rss": max(0, peak - before),
        "delegate": session.delegate,
        "delegate_refused": session.fallback,
    }


def _reset_peak() -> None:
    # Writing 5 sets VmHWM to the current size (proc(5)). If that is not allowed, VmHWM keeps the peak of the import.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LatencyError(f"/proc/self/status has no {field}; latency is measured on Linux only")


def _child(connection: Connection, path: Path, threads: int, seconds: float, runtime: str) -> None:
    try:
        connection.send(one(path, threads, seconds, runtime))
    except CnnoptError as error:
        connection.send(error)


def _measured(path: Path, threads: int, seconds: float, runtime: str) -> dict[str, Any]:
    """``one`` in a separate process: memory that one measurement has taken must not hide that of the next."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(send, path, threads, seconds, runtime))
    process.start()
    send.close()
    try:
        outcome = receive.recv()
    except EOFError:
        process.join()
        outcome = LatencyError(f"{path} ended the process that ran it (status {process.exitcode}); export it again")
    process.join()
    if isinstance(outcome, CnnoptError):
        raise outcome
    return outcome


def _counts(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise argparse.ArgumentTypeError(f"'{text}': give numbers with commas, such as 1,2")
    return [int(count) for count in counts]


@one_line("cnnopt.export.latency")
def main() -> int:
    """Measure the files of the command line. Every expected failure prints one line and gives an exit status."""
    parser = Parser(prog="cnnopt.export.latency", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--threads", type=_counts, default=[1, host.cores()], help="numbers, with commas")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--runtime", choices=RUNTIMES, default="tf", help="package of the interpreter [tf]")
    given = parser.parse_args()
    choose_runtime(given.runtime)
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    from cnnopt.export import interpret

    with host.quiet_stderr():
        # Once here, so that the forked processes need not.
        interpret.library(given.runtime)
    timings = [[_measured(f, count, given.seconds, given.runtime) for count in given.threads] for f in given.files]
    print(json.dumps(timings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
