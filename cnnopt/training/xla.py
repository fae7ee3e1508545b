"""XLA compiles the arithmetic of a step and of the evaluation, if ``--compile`` asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf


@dataclass(frozen=True)
class Compiler:
    """Whether XLA compiles, and ``say``, which gets one line for each thing that was compiled."""

    enabled: bool = False
    say: Callable[[str], None] = lambda text: None

    def compiled(self, function: Callable) -> Callable:
        """``function`` compiled by XLA as one TensorFlow operation, or unchanged if nothing is compiled."""
        return tf.function(function, autograph=False, jit_compile=True) if self.enabled else function

    def announced(self, function: Callable, what: str) -> Callable:
        """``function``, which says after its first call how long that took: XLA compiles within the first call."""
        if not self.enabled:
            return function
        first = True

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal first
            started = time.perf_counter()
            result = function(*arguments, **named)
            if first:
                # A GPU may still be computing.
                tf.nest.map_structure(lambda tensor: tensor.numpy(), result)
                self.say(f"XLA compiled {what} in {time.perf_counter() - started:.1f} s")
                first = False
            return result

        return call
