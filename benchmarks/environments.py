#!/usr/bin/env python
"""Checkouts of this program side by side: the same steps by another commit, or with another TensorFlow.

Each folder is a checkout with an environment in .venv. All of them train the same network on this machine and take
turns. The ratios are of the first one's speed.

    .venv/bin/python benchmarks/environments.py .. /tmp/before . --ranks 2 --depth 44 --rounds 15 --steps 4
"""

import contextlib
import sys
from pathlib import Path

from hosts import start
from side_by_side import arguments, interleave, median_and_spread, ratio, report, table


def main() -> None:
    """Measure, print the table, write every figure."""
    parser = arguments(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="checkouts; the others are compared with the first")
    parser.add_argument("--ranks", type=int, default=2, help="that share the cores; 1 is one process with all of them")
    parser.add_argument("--optimizer", default="muon", choices=["sgd", "muon"])
    args = parser.parse_args()
    rows, content = [], {}
    for depth in args.depth:
        with contextlib.ExitStack() as stack:
            turns = {}
            for number, folder in enumerate(map(Path.absolute, args.folders)):
                contestant = start(
                    f"{number}-{folder.name}-{depth}",
                    [str(folder / "benchmarks/workers/ours.py"), str(depth), str(args.batch), args.precision],
                    args.ranks,
                    python=str(folder / ".venv/bin/python"),
                    environment={"PYTHONPATH": f"{folder}:{folder / 'benchmarks'}"},
                )
                turns[str(folder)] = (
                    stack.enter_context(contestant),
                    {"steps": args.steps, "optimizer": args.optimizer},
                )
            seconds = interleave(turns, rounds=args.rounds)
        first = next(iter(seconds.values()))
        for name, values in seconds.items():
            middle, spread = median_and_spread(values)
            speed = f"{args.ranks * args.batch / middle:.0f} ±{spread:.1%}"
            rows.append([f"ResNet-{depth}", name, speed, ratio(first, values, digits=3)])
        content[str(depth)] = seconds
    text = f"{args.ranks} ranks, {args.precision}, batch {args.batch} a rank, {args.optimizer}, "
    text += f"{args.steps} steps x {args.rounds} rounds\n\n"
    report(args.out, text + table(["network", "checkout", "images/s", "of the first"], rows), {"runs": content})


if __name__ == "__main__":
    sys.exit(main())
