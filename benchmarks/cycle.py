#!/usr/bin/env python
"""What Horovod's threads take from those that compute: by how often they look for work, and by their priority.

Two ranks on this machine for each ``HOROVOD_CYCLE_TIME``, which take turns, with the exchange and without, Horovod's
threads giving way, as in the program, and with the priority of all others. The latter needs root to be undone.

    sudo .venv/bin/python benchmarks/cycle.py --depth 20 44 --out cycle.json
"""

import contextlib
import os
import statistics
import sys
from typing import Any

from hosts import start
from side_by_side import arguments, interleave, median_and_spread, ratio, report, table

WORKER = "benchmarks/workers/ours.py"


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
                    start(f"cycle-{depth}-{cycle:g}", [WORKER, str(depth), str(args.batch), args.precision], 2,
                          environment={"HOROVOD_CYCLE_TIME": f"{cycle:g}"})
                )  # fmt: skip
                # Of one exchange the ways do not follow each other, or the second would find its data in the caches.
                for way, gives_way in (("give way", True), ("as others", False)):
                    for exchange in ("none", "dense", "sparse"):
                        request = {"steps": args.steps, "exchange": exchange, "gives_way": gives_way}
                        turns[f"{cycle:g}/{way}/{exchange}"] = (ours, request)
            compute = ours.ask(steps=1)[0]["compute"]
            heard: dict[str, list[dict[str, Any]]] = {turn: [] for turn in turns}
            seconds = interleave(
                turns, rounds=args.rounds, after=lambda turn, answers, heard=heard: heard[turn].extend(answers)
            )
        shares = {
            turn: [answer["horovods_seconds"] / answer["seconds"] for answer in answers]
            for turn, answers in heard.items()
        }
        # Of the round, over all cycles: what is left out waits for none.
        alone = [
            statistics.median(found)
            for found in zip(*(v for k, v in seconds.items() if k.endswith("give way/none")), strict=True)
        ]
        for turn, values in seconds.items():
            middle, spread = median_and_spread(values)
            cycle, way, exchange = turn.split("/")
            gain = ratio(seconds[f"{cycle}/as others/{exchange}"], values, digits=3) if way == "give way" else ""
            rows.append(
                [f"ResNet-{depth}", cycle, way, "left out" if exchange == "none" else exchange,
                 f"{1e3 * middle:.1f} ±{spread:.0%}", ratio(alone, values, digits=3), gain,
                 f"{statistics.mean(shares[turn]):.1%}"]
            )  # fmt: skip
        content[str(depth)] = {"compute": compute, "seconds": seconds, "horovods_share": shares}
    text = f"Two ranks, {compute}, batch {args.batch} a rank, {args.steps} steps x {args.rounds} rounds\n\n"
    heads = ["network", "cycle, ms", "Horovod's threads", "exchange", "ms a step", "of the speed without exchange",
             "giving way makes it faster by", "Horovod's threads, of a core"]  # fmt: skip
    report(args.out, text + table(heads, rows), {"batch": args.batch, "steps": args.steps, "runs": content})


if __name__ == "__main__":
    sys.exit(main())
