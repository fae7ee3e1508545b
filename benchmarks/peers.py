#!/usr/bin/env python
"""Speed relative to other trainers: two ranks each, the same network, the same minutes.

All contestants stay up and take turns. Ours trains as the program does, with augmented images, 60% zeros and the
exchange that it chooses. It runs with SGD, as the others do, with Muon, its default, and with bfloat16 on the wire. The
others get one resident batch: PyTorch's DistributedDataParallel (channels_last, gloo; with its own Python,
--torch-python), MultiWorkerMirroredStrategy, Horovod's DistributedOptimizer under Keras ``fit``, and the same with
tfmot's ``prune_low_magnitude``, which knows float32 only.

Each rank gets its share of the cores and as many threads, as in the program. With --as-shipped the ranks start as their
guides say: ours divides the cores, torchrun gives a rank one thread, and TensorFlow's trainers take a thread for each
core of the machine.

With --link the two ranks run on hosts (network namespaces) that such a link joins; this needs root.

    .venv/bin/python benchmarks/peers.py --depth 20 44 --torch-python .venv-peers/bin/python
"""

import contextlib
import socket
import sys
from typing import Any

from hosts import Hosts, hosts, start
from side_by_side import arguments, interleave, median_and_spread, ratio, report, table

KERAS, DDP = "benchmarks/workers/keras_peers.py", "benchmarks/workers/ddp.py"
NAMES = {
    "ours": "cnnopt, 60% sparse",
    "muon": "cnnopt, 60% sparse, Muon",
    "none": "cnnopt, 60% sparse, exchange left out",
    "half": "cnnopt, 60% sparse, bfloat16 on the wire",
    "multiworker": "MultiWorkerMirroredStrategy, dense",
    "ddp": "PyTorch DDP, dense",
    "horovod": "Horovod Keras fit, dense",
    "tfmot": "Horovod Keras fit, tfmot 60% sparse, float32",
}


def free_ports(count: int) -> int:
    """The first of ``count`` ports after each other that nobody listens on now."""
    for first in range(20000, 60000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("no free ports")


def main() -> None:
    """Measure, print the table, write every figure."""
    parser = arguments(__doc__)
    parser.add_argument("--torch-python", help="a Python that has PyTorch; without it DDP is left out")
    parser.add_argument("--exchange", default="auto", choices=["auto", "dense", "sparse"], help="of our own ranks")
    parser.add_argument("--as-shipped", action="store_true", help="no rank is given cores or a number of threads")
    parser.add_argument("--link", help="between the ranks, such as 1gbit [none]")
    peers = [name for name in NAMES if name not in ("ours", "muon", "none", "half")]
    parser.add_argument("--peers", nargs="+", default=peers, choices=peers)
    args = parser.parse_args()
    if args.link and args.as_shipped:
        parser.error("--link gives each rank its cores: leave out --as-shipped")
    rows, content = [], {}
    for depth in args.depth:
        size = [str(depth), str(args.batch)]
        with contextlib.ExitStack() as stack:
            on = stack.enter_context(hosts(2)) if args.link else Hosts(0)
            if args.link:
                on.limit(args.link)
            place = {"on": on, "pinned": not args.as_shipped}
            worker = ["benchmarks/workers/ours.py", *size, args.precision]
            ours = stack.enter_context(start(f"ours-{depth}", worker, 2, **place))
            compute = ours.ask(steps=1)[0]["compute"]
            steps = {"steps": args.steps}
            turns = {
                "ours": (ours, {**steps, "exchange": args.exchange}),
                "muon": (ours, {**steps, "exchange": args.exchange, "optimizer": "muon"}),
                "none": (ours, {**steps, "exchange": "none"}),
                "half": (ours, {**steps, "exchange": args.exchange, "wire": "bfloat16"}),
            }
            # Both at once, because a trainer takes its ports only seconds after its start.
            first_port = free_ports(2 * len(args.peers))
            for i, peer in enumerate(args.peers):
                # A port for each rank, because both may have one address.
                both = zip(on.addresses * 2, (first_port + 2 * i, first_port + 2 * i + 1), strict=False)
                addresses = ",".join(f"{address}:{port}" for address, port in both)
                worker = [DDP, *size, compute] if peer == "ddp" else [KERAS, *size, compute, peer]
                if peer == "ddp" and not args.torch_python:
                    continue
                contestant = start(
                    f"{peer}-{depth}", worker, 2, horovod=peer in ("horovod", "tfmot"), **place,
                    python=args.torch_python if peer == "ddp" else sys.executable,
                    environment={"PEER_ADDRESSES": addresses},
                )  # fmt: skip
                turns[peer] = (stack.enter_context(contestant), steps)
            heard: dict[str, list[dict[str, Any]]] = {}
            seconds = interleave(turns, rounds=args.rounds, after=heard.__setitem__)
        exchanges = {name: heard[name][0]["exchange"] for name in ("ours", "muon", "half")}
        for name, values in seconds.items():
            middle, spread = median_and_spread(values)
            speed = f"{2 * args.batch / middle:.0f} ±{spread:.0%}"
            ratios = [ratio(values, seconds[mine]) for mine in ("ours", "muon")]
            sent = f" ({exchanges[name]} exchange)" if name in exchanges else ""
            rows.append([f"ResNet-{depth}", NAMES[name] + sent, speed, *ratios])
        content[str(depth)] = {"compute": compute, "seconds": seconds, "exchanges": exchanges}
    given = "as shipped" if args.as_shipped else "cores of their own"
    given += f", a link of {args.link}" if args.link else ""
    text = f"Two ranks, {given}, {compute}, batch {args.batch} a rank, {args.steps} steps x {args.rounds} rounds\n\n"
    heads = ["network", "trainer", "images/s", "ours is faster by", "with Muon by"]
    report(args.out, text + table(heads, rows), {"batch": args.batch, "steps": args.steps, "runs": content})


if __name__ == "__main__":
    sys.exit(main())
