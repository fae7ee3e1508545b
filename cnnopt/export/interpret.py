"""Run a .tflite file with TensorFlow Lite's interpreter, from TensorFlow (after ``host.prepare``) or from LiteRT."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnopt import interrupt
from cnnopt.distributed.host import quiet_stderr
from cnnopt.export.tflite_file import TfliteError


@dataclass(frozen=True)
class Session:
    """An interpreter, the delegate that computes for it, and the reason if that delegate is not XNNPACK."""

    interpreter: Any
    delegate: str
    fallback: str | None


def library(runtime: str) -> tuple[Any, Any]:
    """Interpreter and OpResolverType of TensorFlow (``tf``) or LiteRT (``litert``). Both have the same code."""
    with interrupt.importing(), quiet_stderr():
        if runtime == "litert":
            from ai_edge_litert import interpreter

            return interpreter.Interpreter, interpreter.OpResolverType
        import tensorflow as tf

        return tf.lite.Interpreter, tf.lite.experimental.OpResolverType


def start(data: bytes, path: Path, *, threads: int, batch: int = 1, runtime: str = "tf") -> Session:
    """An interpreter with its tensors allocated for ``batch`` images. Raises TfliteError, which names ``path``, if the
    file is damaged.

    XNNPACK refuses some graphs (sparse int8 weights under float activations). TFLite's own kernels run those graphs.
    """
    interpreter_of, resolver = library(runtime)
    reasons = []
    for kind in (resolver.AUTO, resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES):
        try:
            with quiet_stderr(), warnings.catch_warnings():
                # TensorFlow warns that tf.lite.Interpreter moves to another package in TensorFlow 2.20.
                warnings.simplefilter("ignore")
                interpreter = interpreter_of(
                    model_content=data, num_threads=threads, experimental_op_resolver_type=kind
                )
                source = interpreter.get_input_details()[0]
                # Resize before the tensors are allocated: XNNPACK crashes on dynamic-range files that are resized
                # afterwards (TensorFlow 2.18.1).
                interpreter.resize_tensor_input(source["index"], [batch, *source["shape"][1:]])
                interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            reasons.append(" ".join(str(error).split())[:160])
            continue
        delegated = any(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details())
        return Session(interpreter, "XNNPACK" if delegated else "none", reasons[0] if reasons else None)
    raise TfliteError(f"{path} cannot be run ({reasons[-1]}); export it again")


def quantized(images: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Pixels uint8 [n, 32, 32, 3], converted to the type and the scale of the file's input tensor."""
    if details["dtype"] == np.float32:
        return images.astype(np.float32)
    scale, zero = details["quantization"]
    limits = np.iinfo(details["dtype"])
    return np.clip(np.rint(images / scale) + zero, limits.min, limits.max).astype(details["dtype"])


def dequantized(output: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Logits float32 [n, classes] from the output tensor of the file."""
    if details["dtype"] == np.float32:
        return output
    scale, zero = details["quantization"]
    return (output.astype(np.float32) - zero) * np.float32(scale)


def logits(
    data: bytes,
    path: Path,
    images: np.ndarray,
    *,
    threads: int,
    batch: int = 50,
    runtime: str = "tf",
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Logits float32 [n, classes] of images uint8 [n, 32, 32, 3].

    Each of ``threads`` threads has a separate interpreter and takes the next batch. This keeps all cores busy, even if
    small layers do not divide over them. ``advance`` gets the size of each finished batch. Raises TfliteError.
    """
    batch = min(batch, len(images))
    starts = iter(range(0, len(images), batch))
    lock = threading.Lock()
    results: dict[int, np.ndarray] = {}
    errors: list[BaseException] = []
    # quiet_stderr changes the whole process, so interpreters are made one after the other.
    count = min(threads, -(-len(images) // batch))
    sessions = [start(data, path, threads=1, batch=batch, runtime=runtime) for _ in range(count)]

    def work(session: Session) -> None:
        interpreter = session.interpreter
        source, sink = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        try:
            while not errors:
                with lock:
                    first = next(starts, None)
                if first is None:
                    return
                part = images[first : first + batch]
                # The last batch is filled up, because the batch size may not change.
                full = part if len(part) == batch else np.concatenate([part, images[: batch - len(part)]])
                interpreter.set_tensor(source["index"], quantized(full, source))
                interpreter.invoke()
                results[first] = dequantized(interpreter.get_tensor(sink["index"])[: len(part)], sink)
                with lock:
                    advance(len(part))
        # Catch every kind of error: a thread that ends early would leave a gap in the results that nobody notices.
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(session,), daemon=True) for session in sessions]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors and not isinstance(errors[0], (RuntimeError, ValueError)):
        raise errors[0]
    if errors:
        raise TfliteError(f"{path} cannot be run ({' '.join(str(errors[0]).split())[:160]}); export it again")
    return np.concatenate([results[first] for first in sorted(results)])
