#!/usr/bin/env python
"""How often Horovod's background thread should look for work: what an exchange waits against what looking costs.

Two ranks on this machine for each ``HOROVOD_CYCLE_TIME``, all of which take turns, with the exchange and without. An
exchange waits for the next cycle, or the one after it; and each cycle takes time from the thread that computes.

    .venv/bin/python benchmarks/cycle.py --depth 20 44 --out docs/benchmarks/cycle.json
"""

import contextlib
import statistics
import sys

from hosts import start
from side_by_side import arguments, interleave, median_and_spread, ratio, report, table

WORKER = "benchmarks/workers/ours.py"


def main() -> None:
    """Measure, print the table, write every figure."""
    parser = arguments(__doc__)
    parser.add_argument("--cycles", type=float, nargs="+", default=[1, 2, 4, 10], help="milliseconds")
    args = parser.parse_args()
    rows, content = [], {}
    for depth in args.depth:
        turns = {}
        with contextlib.ExitStack() as stack:
            for cycle in args.cycles:
                ours = stack.enter_context(
                    start(f"cycle-{depth}-{cycle:g}", [WORKER, str(depth), str(args.batch), args.precision], 2,
                          environment={"HOROVOD_CYCLE_TIME": f"{cycle:g}"})
                )  # fmt: skip
                for exchange in ("none", "dense", "sparse"):
                    turns[f"{cycle:g} {exchange}"] = (ours, {"steps": args.steps, "exchange": exchange})
            compute = ours.ask(steps=1)[0]["compute"]
            seconds = interleave(turns, rounds=args.rounds)
        # Of the round, over all cycles: what is left out does not wait for any.
        alone = [
            statistics.median(found)
            for found in zip(*(v for k, v in seconds.items() if k.endswith("none")), strict=True)
        ]
        for turn, values in seconds.items():
            middle, spread = median_and_spread(values)
            cycle, exchange = turn.split()
            kind = "left out" if exchange == "none" else exchange
            rows.append(
                [f"ResNet-{depth}", cycle, kind, f"{1e3 * middle:.1f} ±{spread:.0%}", ratio(alone, values, digits=3)]
            )
        content[str(depth)] = {"compute": compute, "seconds": seconds}
    text = f"Two ranks, {compute}, batch {args.batch} a rank, {args.steps} steps x {args.rounds} rounds\n\n"
    heads = ["network", "cycle, ms", "exchange", "ms a step", "of the speed without exchange"]
    report(args.out, text + table(heads, rows), {"batch": args.batch, "steps": args.steps, "runs": content})


if __name__ == "__main__":
    sys.exit(main())
