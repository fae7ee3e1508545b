#!/usr/bin/env python
"""Time of each kind of TensorFlow operation in a step: one process, one thread, one operation at a time.

TensorFlow's profiler writes a trace each round. The table has the time of each kind of operation, without the
operations that it calls: the median of the rounds, beside the rate of a matrix product in the same process. The step
trains one resident batch, because the thread of the input pipeline would disturb the measurement. A second table has
the bytes that each kind reads and writes, by the shapes of its inputs and outputs, before TensorFlow fuses any.

    .venv/bin/python benchmarks/operations.py --depth 44 --batch 64
    horovodrun -np 2 .venv/bin/python benchmarks/operations.py --depth 44 --batch 64    # with the exchange
    horovodrun -np 2 .venv/bin/python benchmarks/operations.py --depth 44 --batch 64 --compile
"""

import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from side_by_side import arguments, report, table

from cnnopt.distributed import collectives
from cnnopt.distributed.world import launched

os.environ |= {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
collectives.prepare(launched()[0], verbose=False)
WORLD = collectives.start(verbose=False)

import tensorflow as tf  # noqa: E402
from arithmetic import GEMM, floating_point_operations, matrix_product  # noqa: E402
from tensorflow.tsl.profiler.protobuf import xplane_pb2  # noqa: E402

from cnnopt.config import TrainConfig  # noqa: E402
from cnnopt.data import datasets  # noqa: E402
from cnnopt.model import precision  # noqa: E402
from cnnopt.schedules import Timeline  # noqa: E402
from cnnopt.training.build import build_model  # noqa: E402
from cnnopt.training.stream import HostStream  # noqa: E402
from cnnopt.training.xla import Compiler  # noqa: E402

# Kinds that take a smaller share of a step are added up.
SMALL = 0.004
XLA = "compiled by XLA"
# Not TensorFlow operations of the step: the executor, XLA's kernels, and what passes arguments and results.
PASSED = ("executor", XLA, "_Arg", "_Retval", "NoOp")
# They pass a tensor on, read its shape, or disappear when TensorFlow simplifies the graph.
MOVES_NOTHING = ("Identity", "IdentityN", "Shape", "ShapeN", "Fill", "Reshape", "Bitcast")


def self_times(trace: Path) -> tuple[Counter[str], Counter[str]]:
    """Seconds by kind of operation, and how many there were, of the thread that computes in a trace's folder."""
    space = xplane_pb2.XSpace()
    space.ParseFromString(next(trace.rglob("*.xplane.pb")).read_bytes())
    lines = ((plane, line) for plane in space.planes for line in plane.lines if line.name.startswith("tf_Compute"))
    plane, line = max(lines, key=lambda found: len(found[1].events))
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    around: list[tuple[int, str]] = []
    for event in sorted(line.events, key=lambda e: (e.offset_ps, -e.duration_ps)):
        name = plane.event_metadata[event.metadata_id].name
        while around and around[-1][0] <= event.offset_ps:
            around.pop()
        # Operations are named "node:kind". XLA's kernels lie within the call of an executable. All else belongs to the
        # executor.
        kind = name.rsplit(":", 1)[1] if ":" in name and "::" not in name else "executor"
        if name.startswith("CpuExecutable::") or (around and around[-1][1] == XLA):
            kind = XLA
        if around:
            seconds[around[-1][1]] -= event.duration_ps * 1e-12
        seconds[kind] += event.duration_ps * 1e-12
        # A call of an executable counts as one operation.
        counts[kind] += kind != XLA or name.startswith("CpuExecutable::")
        around.append((event.offset_ps + event.duration_ps, kind))
    return seconds, counts


def bytes_moved(graph: tf.Graph) -> tuple[Counter[str], Counter[str]]:
    """Bytes of inputs and outputs by kind of operation, in a graph and what it calls, and how many there are."""
    moved: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for operation in graph.get_operations():
        kind = operation.type
        if kind in ("PartitionedCall", "StatefulPartitionedCall"):
            called = graph._get_function(operation.get_attr("f").name)
            if not called.definition.attr["_XlaMustCompile"].b:
                found, number = bytes_moved(called.graph)
                moved += found
                counts += number
                continue
            kind = XLA
        if kind in MOVES_NOTHING:
            continue
        tensors = [*operation.inputs, *operation.outputs]
        # XLA gets some numbers as bits.
        known = [t for t in tensors if t.shape.is_fully_defined() and (t.dtype.is_floating or kind == XLA)]
        moved[kind] += sum(t.shape.num_elements() * t.dtype.size for t in known)
        counts[kind] += 1
    return moved, counts


def profile(depth: int, batch: int, steps: int, rounds: int, asked: str, compiles: bool) -> tuple[str, dict]:
    """The table of one network, and every figure."""
    images = datasets.load("synthetic", synthetic_sizes=(batch, batch))
    compute = precision.choose(asked, has_gpu=collectives.device() == "GPU")
    config = TrainConfig(dataset="synthetic", depth=depth, batch_size=batch * WORLD.size, epochs=1000, base_lr=1e-3,
                         optimizer="sgd", prune_begin="0s", prune_end="1s", name="operations")  # fmt: skip
    timeline = Timeline(batch, batch, config.epochs)
    model = build_model(config, images, timeline, compute, ranks=WORLD.size, compiler=Compiler(compiles))
    model.prune(1)
    labels = images.train_labels.astype("int64")
    stream = HostStream(iter(tf.data.Dataset.from_tensors((images.train_images, labels)).repeat()))
    for _ in range(3):
        model.train(stream, 0, 1)
    product = matrix_product(compute.compute)
    product()
    traces, products = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(10):
            product()
        products.append((time.perf_counter() - started) / 10)
        with tempfile.TemporaryDirectory() as folder:
            with tf.profiler.experimental.Profile(folder):
                for _ in range(steps):
                    model.train(stream, 0, 1)
            traces.append(self_times(Path(folder)))
    counts = traces[0][1]
    seconds = Counter({kind: statistics.median(spent[kind] for spent, _ in traces) for kind in counts})
    total = sum(seconds.values())
    # Of a compiled step few operations are left, and all are shown.
    shown = [kind for kind, spent in seconds.most_common() if spent >= SMALL * total or compiles]
    rest = sum(spent for kind, spent in seconds.items() if kind not in shown)
    number = sum(count for kind, count in counts.items() if kind not in shown)
    rows = [
        [kind, f"{count / steps:.0f}", f"{1e3 * spent / steps:.2f}", f"{spent / total:.1%}"]
        for kind, count, spent in [
            *((k, counts[k], seconds[k]) for k in shown),
            ("all others", number, rest),
            ("together", sum(counts.values()) - sum(counts[kind] for kind in PASSED), total - seconds["executor"]),
        ]
    ]
    gemm = 2 * GEMM**3 / statistics.median(products)
    multiplied = floating_point_operations(model) * batch * steps
    convolutions = sum(spent for kind, spent in seconds.items() if "Conv2D" in kind)
    of_that = f"the convolutions {multiplied / convolutions / gemm:.2f} of that, " if convolutions else ""
    text = (
        f"ResNet-{depth}, {compute.compute}, batch {batch}, one thread: {1e3 * total / steps:.0f} ms a step. A matrix "
        f"product of {GEMM} x {GEMM} makes {gemm / 1e9:.0f} GFLOP/s, {of_that}over the whole step "
        f"{multiplied / total / gemm:.2f}\n\n"
    )
    text += table(["operation", "a step", "ms", "of a step"], rows)
    moved, number = bytes_moved(model.train_call.get_concrete_function(stream.given(0, 1), stream.item, None).graph)
    most = [[kind, number[kind], f"{size / 1e6:.0f}"] for kind, size in moved.most_common(12)]
    text += "\n\n" + table(["operation of the graph", "a step", "MB read and written"], most)
    return text, {
        "compute": compute.compute,
        "steps": steps,
        "rounds": rounds,
        "gemm": gemm,
        "multiplied": multiplied,
        "seconds": dict(seconds),
        "counts": dict(counts),
        "bytes": dict(moved),
    }


def main() -> None:
    """Measure, print the tables, write every figure."""
    parser = arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="let XLA compile the step")
    args = parser.parse_args()
    found = {
        str(depth): profile(depth, args.batch, args.steps, args.rounds, args.precision, args.compile)
        for depth in args.depth
    }
    runs = {depth: content for depth, (_, content) in found.items()}
    if WORLD.first:
        report(args.out, "\n\n".join(text for text, _ in found.values()), {"batch": args.batch, "runs": runs})


if __name__ == "__main__":
    sys.exit(main())
