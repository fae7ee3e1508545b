#!/usr/bin/env python
"""Speed with and without the lower priority of Horovod's threads, and with and without core binding.

Two ranks on this machine for each ``HOROVOD_CYCLE_TIME`` take turns, with the exchange and without. They run as in the
program, with Horovod's threads at normal priority (needs root), and with ranks that may run on all cores.

    sudo .venv/bin/python benchmarks/cores.py --depth 20 44 --out cores.json
"""

import contextlib
import os
import statistics
import sys
from typing import Any

from hosts import start
from side_by_side import arguments, interleave, median_and_spread, ratio, report, table

WORKER = "benchmarks/workers/ours.py"
PROGRAM = "as the program"
WAYS = {
    PROGRAM: {"gives_way": True, "bound": True},
    "Horovod's do not give way": {"gives_way": False, "bound": True},
    "ranks on all cores": {"gives_way": True, "bound": False},
}


def main() -> None:
    """Measure, print the table, write every figure."""
    parser = arguments(__doc__)
    parser.add_argument("--cycles", type=float, nargs="+", default=[1], help="milliseconds")
    args = parser.parse_args()
    if os.geteuid():
        sys.exit("a thread that gives way gets its priority back from root alone: run this with sudo")
    rows, content = [], {}
    for depth in args.depth:
        turns = {}
        with contextlib.ExitStack() as stack:
            for cycle in args.cycles:
                ours = stack.enter_context(
                    start(f"cores-{depth}-{cycle:g}", [WORKER, str(depth), str(args.batch), args.precision], 2,
                          environment={"HOROVOD_CYCLE_TIME": f"{cycle:g}"})
                )  # fmt: skip
                # Turns with the same exchange do not follow each other: the second would find its data in the caches.
                for way, request in WAYS.items():
                    for exchange in ("none", "dense", "sparse"):
                        turns[f"{cycle:g}/{way}/{exchange}"] = (
                            ours, {"steps": args.steps, "exchange": exchange, **request}
                        )  # fmt: skip
            compute = ours.ask(steps=1)[0]["compute"]
            heard: dict[str, list[dict[str, Any]]] = {turn: [] for turn in turns}
            seconds = interleave(
                turns, rounds=args.rounds, after=lambda turn, answers, heard=heard: heard[turn].extend(answers)
            )
        shares = {
            turn: [answer["horovods_seconds"] / answer["seconds"] for answer in answers]
            for turn, answers in heard.items()
        }
        # The reference of a round, over all cycles: without an exchange there is no cycle to wait for.
        alone = [
            statistics.median(found)
            for found in zip(*(v for k, v in seconds.items() if k.endswith(f"{PROGRAM}/none")), strict=True)
        ]
        for turn, values in seconds.items():
            middle, spread = median_and_spread(values)
            cycle, way, exchange = turn.split("/")
            slower = ratio(values, seconds[f"{cycle}/{PROGRAM}/{exchange}"], digits=3) if way != PROGRAM else ""
            rows.append(
                [f"ResNet-{depth}", cycle, way, "left out" if exchange == "none" else exchange,
                 f"{1e3 * middle:.1f} ±{spread:.0%}", ratio(alone, values, digits=3), slower,
                 f"{statistics.mean(shares[turn]):.1%}"]
            )  # fmt: skip
        content[str(depth)] = {"compute": compute, "seconds": seconds, "horovods_share": shares}
    text = f"Two ranks, {compute}, batch {args.batch} a rank, {args.steps} steps x {args.rounds} rounds\n\n"
    heads = ["network", "cycle, ms", "threads", "exchange", "ms a step", "of the speed without exchange",
             "the program is faster by", "Horovod's threads, of a core"]  # fmt: skip
    report(args.out, text + table(heads, rows), {"batch": args.batch, "steps": args.steps, "runs": content})


if __name__ == "__main__":
    sys.exit(main())
