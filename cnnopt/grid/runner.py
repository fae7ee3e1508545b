"""Run the cells of a study one after the other: train, quantize, measure.

A cell is a run folder, so everything that is done stays done, and the same study goes on after any interruption.
Several studies may share a folder: each takes the next cell that no other is running.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from cnnopt.command_line import python_m
from cnnopt.distributed.child import end_with_parent
from cnnopt.distributed.signals import INTERRUPTED, STOPPED
from cnnopt.errors import CnnoptError, RunError
from cnnopt.grid import progress
from cnnopt.grid.cells import Cell
from cnnopt.run import locks
from cnnopt.run.run_folder import RunFolder, minutes

PROGRAM = Path(__file__).parents[2] / "train_hvd.py"
LOG = "study.log"
#: Seconds between two lines about a running cell, where the output is no terminal.
QUIET = 60.0


class Stopped(Exception):  # noqa: N818
    """The study was told to stop. ``status`` is its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Runner:
    """Runs cells, and passes signals on to the one that runs.

    The children are in a session of their own. So a terminal's Ctrl-C reaches only this process, which passes it on
    once: a rank that gets two would end without saving.
    """

    def __init__(self, cells: Sequence[Cell], quantize: Sequence[str], variants: Sequence[str]) -> None:
        """``quantize``: the flags of ``cnnopt.quantize`` that make ``variants``. No variants: cells only train."""
        self.cells, self.quantize, self.variants = list(cells), list(quantize), list(variants)
        self.pace = progress.Pace(cells)
        self.failures: dict[str, str] = {}
        self.told: int | None = None
        self.child: subprocess.Popen | None = None

    def run(self, after_each: Callable[[Cell], None]) -> int:
        """Run all cells. Returns 0, 1 if a cell has failed, or the status after a signal.

        ``after_each`` gets each cell that has just ended well.
        """
        for told in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            # A shell starts its background commands with Ctrl-C ignored. Leave it ignored.
            if signal.getsignal(told) != signal.SIG_IGN:
                signal.signal(told, self._hear)
        todo: list[Cell] = []
        for cell in self.cells:
            with self._failures_of(cell):
                if progress.state(cell, self.variants) != progress.DONE:
                    todo.append(cell)
        elsewhere = 0
        try:
            for number, cell in enumerate(todo, start=1):
                rest = todo[number - 1 :]
                print(f"{len(rest)} cells to go, time left: {progress.spoken(self.pace.left(rest))}", flush=True)
                title = f"[{number}/{len(todo)}] {cell.name}"
                with self._failures_of(cell), alone(cell) as mine:
                    if mine:
                        self._one(cell, title, rest)
                        after_each(cell)
                    else:
                        elsewhere += 1
                        print(f"{title}: another study runs it", flush=True)
        except Stopped as stop:
            print("stopped; the same command goes on from here", flush=True)
            return stop.status
        done = len(self.cells) - len(self.failures) - elsewhere
        print(f"{done} of {len(self.cells)} cells are done", flush=True)
        for name, why in self.failures.items():
            print(f"failed: {name}: {why}", file=sys.stderr)
        return 1 if self.failures else 0

    @contextlib.contextmanager
    def _failures_of(self, cell: Cell) -> Iterator[None]:
        """Note an expected failure of a cell, so that the others run."""
        try:
            yield
        except (CnnoptError, OSError) as error:
            why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            self.failures[cell.name] = why
            print(f"{cell.name} failed: {why}", flush=True)

    def _one(self, cell: Cell, title: str, rest: Sequence[Cell]) -> None:
        """Train and measure one cell. Raises CnnoptError, OSError, Stopped."""
        begin, before = time.monotonic(), minutes(RunFolder(cell.folder).metrics())
        if progress.state(cell, self.variants) in (progress.WAITING, progress.BEGUN):
            on = f"training on {cell.ranks} ranks" if cell.ranks > 1 else "training"
            self._child(training(cell), cell, f"{title}: {on}", rest)
        if progress.state(cell, self.variants) == progress.TRAINED:
            command = [*python_m("cnnopt.quantize"), str(cell.folder), *self.quantize]
            self._child(command, cell, f"{title}: measuring", rest)
        trained = minutes(RunFolder(cell.folder).metrics()) - before
        self.pace.ended(cell, trained, (time.monotonic() - begin) / 60)

    def _child(self, command: list[str], cell: Cell, title: str, rest: Sequence[Cell]) -> None:
        """Run one command of a cell, and show how far it is. Raises RunError if it fails, OSError, Stopped."""
        self._stop_if_told()
        log = cell.folder / LOG
        show = Show(title)
        with log.open("a") as output:
            self.child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # If this process is killed, the cell saves and ends too, instead of training on unseen.
                preexec_fn=end_with_parent(),
            )
        if self.told is not None:
            self.child.send_signal(self.told)
        while True:
            try:
                code = self.child.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                # A file that cannot be read just now must not leave the child alone.
                with contextlib.suppress(CnnoptError):
                    self.pace.see(cell)
                    epochs, left = progress.epochs_done(cell), progress.spoken(self.pace.left(rest))
                    show(f"epoch {epochs}/{cell.config.epochs}", f"{left} left of the study")
        self.child = None
        show.end()
        self._stop_if_told()
        status = code if code >= 0 else 128 - code
        if status in (STOPPED, INTERRUPTED):
            raise Stopped(status)
        if status:
            raise RunError(f"{_last_line(log, status)} ({log})")

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.told = number
        if self.child is not None:
            self.child.send_signal(number)

    def _stop_if_told(self) -> None:
        if self.told is not None:
            raise Stopped(INTERRUPTED if self.told == signal.SIGINT else STOPPED)


class Show:
    """One line that changes on a terminal, or now and then a line in a log."""

    def __init__(self, title: str) -> None:
        self.title, self.last, self.at = title, "", time.monotonic()
        self.terminal = sys.stdout.isatty()
        if not self.terminal:
            print(title, flush=True)

    def __call__(self, what: str, left: str) -> None:
        """Say what the cell is at, and the time left."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            text = f"  {what}, {left}"
            print("\r" + (self.title[: width - len(text)] + text).ljust(width), end="", flush=True)
        elif what != self.last and time.monotonic() - self.at > QUIET:
            self.at = time.monotonic()
            print(f"{self.title}, {what}, {left}", flush=True)
        self.last = what

    def end(self) -> None:
        """Leave the line."""
        if self.terminal:
            print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="", flush=True)


@contextlib.contextmanager
def alone(cell: Cell) -> Iterator[bool]:
    """Hold a cell against other studies in the same folder. False if another one holds it. Raises OSError."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    lock = locks.hold(cell.folder / ".study.lock")
    if lock is None:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def training(cell: Cell) -> list[str]:
    """The command that trains a cell on its ranks."""
    ranks = str(cell.ranks)
    program = [sys.executable, str(PROGRAM), *cell.flags, "--expect-ranks", ranks]
    return [*python_m("cnnopt.launch"), "-np", ranks, "--", *program]


def _last_line(log: Path, status: int) -> str:
    """Why a command failed: the last line of its output, without what the launcher says of it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line and not line.startswith("cnnopt.launch: rank ")]
    return f"status {status}: {said[-1]}" if said else f"status {status}"
