#!/usr/bin/env python
"""Speed of the exchanges, dense and sparse, on links of 10 Gbit/s, 1 Gbit/s and 100 Mbit/s. Needs root.

Each rank runs on its own host: a network namespace with an equal share of the cores and a link that ``tc tbf`` limits.
All links, exchanges and sparsities take turns in the same processes. "in one" is one bucket, sent when the last
gradient is ready.

    sudo .venv/bin/python benchmarks/exchange.py --batch 16 --out docs/benchmarks/exchange.json
"""

import sys

from hosts import hosts, start
from side_by_side import arguments, interleave, median_and_spread, report, table

WORKER = "benchmarks/workers/ours.py"


def requests(sparsities: list[float]) -> dict[str, dict]:
    """What is compared on each link."""
    found: dict[str, dict] = {"none": {"exchange": "none"}, "dense": {"exchange": "dense"}}
    for sparsity in sparsities:
        found[f"sparse {sparsity:.0%}"] = {"exchange": "sparse", "sparsity": sparsity}
    for name in ("dense", f"sparse {sparsities[-1]:.0%}"):
        found |= {f"{name}, {wire}": {**found[name], "wire": wire} for wire in ("bfloat16", "float16")}
    for name in ("dense", f"sparse {sparsities[0]:.0%}", f"sparse {sparsities[-1]:.0%}"):
        found[f"{name}, in one"] = {**found[name], "bucketed": False}
    return found


def main() -> None:
    """Measure, print the table, write every figure."""
    parser = arguments(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="one on each host")
    parser.add_argument("--links", nargs="+", default=["10gbit", "1gbit", "100mbit"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.6, 0.7, 0.9])
    args = parser.parse_args()
    asked = {name: {**request, "steps": args.steps} for name, request in requests(args.sparsity).items()}
    rows, content = [], {}
    for depth in args.depth:
        command = [WORKER, str(depth), str(args.batch), args.precision]
        with hosts(args.ranks) as namespaces, start(f"exchange-{depth}", command, args.ranks, on=namespaces) as ours:
            turns = {f"{link} {name}": (ours, request) for link in args.links for name, request in asked.items()}
            seconds = interleave(turns, rounds=args.rounds, before=lambda turn: namespaces.limit(turn.split()[0]))
            for name, request in asked.items():
                sent = namespaces.sent_bytes(0)
                answer = ours.ask(**request)[0]
                sent = (namespaces.sent_bytes(0) - sent) / args.steps
                cells = []
                for link in args.links:
                    middle, spread = median_and_spread(seconds[f"{link} {name}"])
                    cells.append(f"{args.ranks * args.batch / middle:.0f} ±{spread:.0%}")
                rows.append([f"ResNet-{depth}", name, f"{answer['bytes']:,.0f}", f"{sent:,.0f}", *cells])
                content[f"{depth} {name}"] = {
                    "bytes": answer["bytes"],
                    "bytes_on_the_link": sent,
                    "compute": answer["compute"],
                    "seconds": {link: seconds[f"{link} {name}"] for link in args.links},
                }
    heads = ["network", "exchange", "bytes a step", "counted on the link", *(f"images/s, {k}" for k in args.links)]
    compute = next(iter(content.values()))["compute"]
    text = f"{args.ranks} ranks, {compute}, batch {args.batch} a rank, {args.steps} steps x {args.rounds} rounds\n\n"
    settings = {"ranks": args.ranks, "batch": args.batch, "steps": args.steps}
    report(args.out, text + table(heads, rows), {**settings, "runs": content})


if __name__ == "__main__":
    sys.exit(main())
