"""Contestants that take turns on one machine: blocks of steps, interleaved, and the medians of many rounds.

Each contestant is a group of processes, one a rank, that stay up for the whole comparison. A rank reads one line of
JSON from standard input, ``{"steps": 20, ...}``, runs the steps, and answers ``@@ {"seconds": ...}``. The time of a
block is that of its slowest rank. The turns change every few seconds, so other load affects all contestants alike.
Waiting contestants with Horovod are stopped, because its thread would use the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ANSWER = "@@ "


class Contestant:
    """Running ranks that answer one request at a time; ``restless`` ones use the processor while they wait."""

    def __init__(self, name: str, ranks: Sequence[subprocess.Popen[str]], *, restless: bool = False) -> None:
        self.name, self.ranks, self.restless = name, list(ranks), restless

    def ask(self, **request: Any) -> list[dict[str, Any]]:
        """Every rank's answer to ``request``; raises RuntimeError, with the log's place, if one ends instead."""
        for process in self.ranks:
            assert process.stdin is not None
            # A rank that has ended gives no answer, and that error says more.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
        return [self._answer(rank) for rank in range(len(self.ranks))]

    def _answer(self, rank: int) -> dict[str, Any]:
        stdout = self.ranks[rank].stdout
        assert stdout is not None
        for line in stdout:
            if line.startswith(ANSWER):
                return dict(json.loads(line.removeprefix(ANSWER)))
        raise RuntimeError(f"{self.name}: rank {rank} has ended; see benchmarks/logs/{self.name}.{rank}.txt")

    def stop(self) -> None:
        """Use no processor until ``go_on``.

        Only ``restless`` ranks: MultiWorkerMirroredStrategy gives up ranks that are silent for 10 seconds.
        """
        for process in self.ranks if self.restless else ():
            process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After ``stop``."""
        for process in self.ranks if self.restless else ():
            process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """End all ranks."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.wait()


def serve(answer: Any) -> None:
    """The other end, in a rank: ``answer(**request)`` gives a dictionary for each request until the input ends."""
    for line in sys.stdin:
        print(ANSWER + json.dumps(answer(**json.loads(line))), flush=True)


def open_log(name: str, rank: int) -> Any:
    """The file for the standard error of rank ``rank`` of contestant ``name``."""
    folder = ROOT / "benchmarks/logs"
    folder.mkdir(exist_ok=True)
    return (folder / f"{name}.{rank}.txt").open("w")


def interleave(
    turns: Mapping[str, tuple[Contestant, dict[str, Any]]],
    *,
    rounds: int,
    before: Any = lambda turn: None,
    after: Any = lambda turn, answers: None,
) -> dict[str, list[float]]:
    """Seconds a step of each turn in each of ``rounds`` rounds, each of which begins with another turn.

    ``turns`` names a contestant and what it is asked, with ``steps`` among it; ``before(name)`` comes first, and
    ``after(name, answers)`` hears the ranks. Two steps that do not count begin each block: the caches hold another's
    data. Two short rounds go before the first: one in which models are built and compiled, and one in which TensorFlow
    prepares again those whose caches the seed of a later model has emptied.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    contestants = {contestant for contestant, _ in turns.values()}
    # All wait from the first block on: there ours may measure which exchange to choose.
    for contestant in contestants:
        contestant.stop()
    for contestant, request in [*turns.values()] * 2:
        contestant.go_on()
        contestant.ask(**{**request, "steps": 2})
        contestant.stop()
    order = list(turns)
    for number in range(1, rounds + 1):
        for name in order:
            contestant, request = turns[name]
            before(name)
            contestant.go_on()
            contestant.ask(**{**request, "steps": 2})
            answers = contestant.ask(**request)
            contestant.stop()
            after(name, answers)
            slowest = max(answer["seconds"] for answer in answers)
            seconds[name].append(slowest / request["steps"])
            print(f"  round {number}/{rounds} {name}: {1e3 * slowest / request['steps']:.1f} ms", file=sys.stderr)
        order.append(order.pop(0))
    for contestant in contestants:
        contestant.go_on()
    return seconds


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and half the distance between the quartiles, as a share of it."""
    middle = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (middle,) * 3
    return middle, (high - low) / 2 / middle


def ratio(values: Sequence[float], others: Sequence[float], *, digits: int = 2) -> str:
    """The median of the rounds' ratios of two turns, and half the distance between their quartiles."""
    middle, spread = median_and_spread([value / other for value, other in zip(values, others, strict=True)])
    return f"{middle:.{digits}f} ±{middle * spread:.{digits}f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine() -> dict[str, Any]:
    """The machine, versions and settings of a measurement."""
    from cnnopt.run.run_folder import environment

    found = environment({})
    load = os.getloadavg()
    return {**found, "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "load_average": load[0]}


def command() -> str:
    """The command line of this process."""
    return " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def report(out: Path | None, text: str, content: Mapping[str, Any]) -> None:
    """Print the table, and write it with all single figures to ``out``."""
    where = machine()
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    print(f"{text}\n\n`{command()}`, {where['measured']}; {where['cpu']}, {where['cores']} cores, load before the "
          f"report {where['load_average']:.1f}; {versions}; commit {where['commit']}")  # fmt: skip
    if out is not None:
        out.write_text(json.dumps({"command": command(), "machine": where, **content}, indent=1) + "\n")


def arguments(description: str | None, *, blocks: bool = True) -> argparse.ArgumentParser:
    """The flags of every comparison; ``--steps`` if it measures ``blocks`` of steps."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--depth", type=int, nargs="+", default=[44], help="of the CIFAR ResNet")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16; auto asks the machine")
    parser.add_argument("--batch", type=int, default=64, help="images a rank")
    if blocks:
        parser.add_argument("--steps", type=int, default=10, help="of one block")
    parser.add_argument("--rounds", type=int, default=5, help="that count")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    return parser
