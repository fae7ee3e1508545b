"""Schedules: durations in steps, and the learning rate as a pure function of the global step.

This module uses the standard library only and has no state. The same step gives the same value on every rank, at
any rank count and after any resume.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Unit = Literal["s", "e", "%", "m"]
MOST = 10**12
UNITS: dict[str, str] = {"s": "steps", "e": "epochs", "%": "percent of the run", "m": "minutes"}


@dataclass(frozen=True)
class Duration:
    """A number and its unit, as written on the command line: ``500s``, ``2e``, ``15%`` or ``10m``."""

    value: float
    unit: Unit

    def __str__(self) -> str:
        return f"{self.value:.12f}".rstrip("0").rstrip(".") + self.unit


def parse_duration(text: str, allowed: str = "se%") -> Duration:
    """Read ``500s`` (steps), ``2e`` (epochs), ``15%`` (of the run) or ``10m`` (minutes).

    For any other text, raises ValueError with a message that names the units in ``allowed``.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([sem%])", text.strip())
    if match is None or match[2] not in allowed:
        forms = ", ".join(f"'{'15' if unit == '%' else '2'}{unit}' ({UNITS[unit]})" for unit in allowed)
        raise ValueError(f"'{text}' is not a duration; write one of {forms}")
    value, unit = float(match[1]), match[2]
    if value > MOST:
        raise ValueError(f"'{text}' is longer than any run; use at most {MOST:,}")
    if unit == "%" and value > 100:
        raise ValueError(f"'{text}' is beyond the end of the run; use at most 100%")
    return Duration(value, unit)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Timeline:
    """The length of a run, in steps of one global batch each.

    The training stream concatenates one permutation of the images per epoch, and cuts it into full global batches.
    So an epoch need not be a whole number of steps. ``epoch_end`` gives the first step count at which every image
    of that epoch has been seen.
    """

    num_images: int
    batch_size: int
    epochs: int

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epoch_end(self.epochs - 1)

    def epoch_end(self, epoch: int) -> int:
        """The number of steps after which all images of epoch ``epoch`` (counted from 0) have been seen."""
        return -(-(epoch + 1) * self.num_images // self.batch_size)

    def epoch_of(self, step: int) -> int:
        """The epoch (counted from 0) that is in progress after ``step`` steps."""
        return step * self.batch_size // self.num_images

    def steps(self, duration: Duration) -> int:
        """``duration`` in steps, rounded to the nearest whole step."""
        if duration.unit == "s":
            return round(duration.value)
        if duration.unit == "e":
            return round(duration.value * self.num_images / self.batch_size)
        if duration.unit == "%":
            return round(duration.value / 100 * self.total_steps)
        raise ValueError(f"{duration}: minutes cannot be turned into steps")


def parse_drops(text: str) -> list[tuple[Duration, float]]:
    """Read ``80e:0.1,120e:0.01``: from each duration on, the learning rate is the peak times that factor."""
    drops = []
    for part in filter(None, text.split(",")):
        when, _, factor = part.partition(":")
        try:
            drops.append((parse_duration(when), float(factor)))
            if not 0 <= drops[-1][1] < math.inf:
                raise ValueError
        except ValueError:
            raise ValueError(f"'{part}' is not DURATION:FACTOR; write for example '80e:0.1'") from None
    return drops


@dataclass(frozen=True)
class LearningRate:
    """Warm-up from 0 to ``peak``, then ``schedule``. Durations are in steps.

    Goyal et al. 2017, section 2.2, warm up in the same way, but from the rate of one worker.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    schedule: Literal["linear", "cosine", "step"] = "linear"
    drops: tuple[tuple[int, float], ...] = ()

    def __call__(self, step: int) -> float:
        """The learning rate for the update that follows ``step`` completed steps."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.schedule == "step":
            reached = [factor for when, factor in sorted(self.drops) if step >= when]
            return self.peak * (reached[-1] if reached else 1.0)
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.schedule == "cosine":
            return self.peak * (1 + math.cos(math.pi * done)) / 2
        return self.peak * (1 - done)


@dataclass(frozen=True)
class PruningWindow:
    """The step counts after which new masks are computed: begin, begin + frequency, ..., end.

    ``end - begin`` is rounded down to a multiple of ``frequency``. The schedules of tensorflow-model-optimization
    fire only at such multiples. Without the rounding they would not fire at ``end_step``, and the run would not
    reach the final sparsity.
    """

    begin: int
    end: int
    frequency: int

    @classmethod
    def aligned(cls, begin: int, end: int, frequency: int) -> PruningWindow:
        """A window that has a mask update exactly at its end."""
        frequency = max(1, min(frequency, end - begin))
        return cls(begin, begin + (end - begin) // frequency * frequency, frequency)

    def updates_after(self, step: int) -> bool:
        """True if the masks change after ``step`` steps."""
        return self.begin <= step <= self.end and (step - self.begin) % self.frequency == 0

    def next_update(self, step: int) -> int | None:
        """The number of steps, more than ``step``, after which the masks change next; None if they stay."""
        following = max(self.begin, step + 1 + (self.begin - step - 1) % self.frequency)
        return following if following <= self.end else None
