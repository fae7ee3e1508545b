#!/usr/bin/env python
"""Step time by ranks, links and bytes; a cost model; and its prediction for more ranks. Needs root.

First 1, 2 and 4 ranks on this machine: weak (--batch images a rank) and strong (--batch images in all), with and
without the exchange. Then two ranks on two hosts, as in exchange.py. The model is fitted to the links of --fit and
compared with those of --held-out.

    sudo .venv/bin/python benchmarks/scaling.py --batch 32 --out docs/benchmarks/scaling.json
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hosts import bits_per_second, hosts, start
from scipy.optimize import nnls
from side_by_side import arguments, interleave, median_and_spread, ratio, report, table

WORKER = "benchmarks/workers/ours.py"
EXCHANGES = {
    "none": {"exchange": "none"},
    "dense": {"exchange": "dense"},
    "sparse 60%": {"exchange": "sparse", "sparsity": 0.6},
    "sparse 90%": {"exchange": "sparse", "sparsity": 0.9},
}


#: Shares of a step without exchange after which each bucket is ready. The forward pass takes a third of the step, and
#: each of three stages a third of the rest, the last stage first.
READY = (5 / 9, 7 / 9, 1)


def on_the_link(compute: float, sizes: Sequence[float], link: float, *, ranks: int = 2, hop: float = 0.0) -> float:
    """Seconds until the last bucket of ``sizes`` bytes has arrived, one after the other, none before it is ready.

    It travels in Gloo's ring: each rank sends 2 (n - 1) / n of it, in 2 (n - 1) messages. These take ``hop`` seconds
    each, but for the two between two ranks, which are part of what is fitted.
    """
    done = 0.0
    for ready, size in zip(READY, sizes, strict=True):
        done = max(done, ready * compute) + 2 * (ranks - 1) / ranks * 8 * size / link + 2 * (ranks - 2) * hop
    return done


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step: ``on_the_link(...) + fixed[kind] + a_byte x bytes``.

    ``a_byte`` is what casting, joining, summing and copying cost. All but the link is work of the core that computes.
    """

    compute: float
    fixed: dict[str, float]
    a_byte: float

    @classmethod
    def fit(cls, compute: float, samples: list[tuple[str, list[float], float, float]]) -> "CostModel":
        """By non-negative least squares, from (kind, bytes, bits a second of the link, seconds) of two ranks."""
        kinds = sorted({kind for kind, *_ in samples})
        # In megabytes, so that the columns have the same magnitude.
        left = [[*(kind == k for k in kinds), sum(sizes) / 1e6] for kind, sizes, _, _ in samples]
        right = [seconds - on_the_link(compute, sizes, link) for _, sizes, link, seconds in samples]
        *fixed, a_byte = nnls(np.array(left, float), np.array(right))[0]
        return cls(compute, dict(zip(kinds, map(float, fixed), strict=True)), float(a_byte) / 1e6)

    def seconds(self, kind: str, sizes: list[float], link: float, *, ranks: int = 2, hop: float = 0.0) -> float:
        """Seconds of a step of ``ranks`` ranks that exchange ``sizes`` bytes over links of ``link`` bits a second."""
        sent = on_the_link(self.compute, sizes, link, ranks=ranks, hop=hop)
        return sent + self.fixed[kind] + self.a_byte * sum(sizes)


def on_this_machine(args, depth: int) -> tuple[str, dict]:
    """1, 2 and 4 ranks, weak and strong."""
    sizes = sorted({(n, args.batch) for n in (1, 2, 4)} | {(n, args.batch // n) for n in (1, 2, 4)})
    with contextlib.ExitStack() as stack:
        turns = {}
        for ranks, batch in sizes:
            command = [WORKER, str(depth), str(batch), args.precision]
            ours = stack.enter_context(start(f"scaling-{depth}-{ranks}x{batch}", command, ranks))
            for name in ("none", "dense"):
                turns[f"{ranks}x{batch} {name}"] = (ours, {**EXCHANGES[name], "steps": args.steps})
        seconds = interleave(turns, rounds=args.rounds)
    rows = []
    for ranks, batch in sizes:
        (alone, _), (exchanged, spread) = (
            median_and_spread(seconds[f"{ranks}x{batch} {name}"]) for name in ("none", "dense")
        )
        kind = "weak and strong" if ranks == 1 else "weak" if batch == args.batch else "strong"
        speeds = [f"{ranks * batch / alone:.0f}", f"{ranks * batch / exchanged:.0f} ±{spread:.0%}"]
        kept = ratio(*(seconds[f"{ranks}x{batch} {name}"] for name in ("none", "dense")), digits=3)
        rows.append([kind, ranks, batch, *speeds, kept])
    heads = ["scaling", "ranks", "images a rank", "images/s, no exchange", "images/s", "kept"]
    return table(heads, rows), seconds


def on_links(args, depth: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Two ranks on limited links: seconds of each turn, and bytes of the buckets of each exchange."""
    links = [*args.fit, *args.held_out]
    command = [WORKER, str(depth), str(args.batch), args.precision]
    with hosts(2) as pair, start(f"scaling-{depth}", command, 2, on=pair) as ours:
        turns = {
            f"{link} {name}": (ours, {**request, "steps": args.steps})
            for link in links
            for name, request in EXCHANGES.items()
        }
        seconds = interleave(turns, rounds=args.rounds, before=lambda turn: pair.limit(turn.split()[0]))
        return seconds, {name: ours.ask(**request, steps=1)[0]["vectors"] for name, request in EXCHANGES.items()}


def compare(args, seconds: dict[str, list[float]], sizes: dict[str, list[float]]) -> tuple[str, CostModel]:
    """The measured steps of ``on_links`` beside those of the model, which is fitted to some of them."""
    links = [*args.fit, *args.held_out]
    medians = {turn: median_and_spread(values)[0] for turn, values in seconds.items()}
    # From the fitted links alone: the model must not see the others.
    compute = float(np.median([medians[f"{link} none"] for link in args.fit]))
    sent = [name for name in EXCHANGES if name != "none"]
    model = CostModel.fit(
        compute,
        [
            (name.split()[0], sizes[name], bits_per_second(link), medians[f"{link} {name}"])
            for link in args.fit
            for name in sent
        ],
    )
    rows = []
    for link in links:
        for name in sent:
            found = medians[f"{link} {name}"]
            said = model.seconds(name.split()[0], sizes[name], bits_per_second(link))
            use = "fitted" if link in args.fit else "held out"
            rows.append([link, name, f"{1e3 * found:.0f}", f"{1e3 * said:.0f}", f"{said / found - 1:+.1%}", use])
    return table(["link", "exchange", "ms measured", "ms of the model", "error", ""], rows), model


def extrapolation(args, model: CostModel, sizes: dict[str, list[float]]) -> tuple[str, dict[str, list[float]]]:
    """Share of the speed without exchange, to 1,024 ranks."""
    counts = [2**i for i in range(1, 11)]
    curves = {
        f"{name}, {link}": [
            model.compute
            / model.seconds(name.split()[0], sizes[name], bits_per_second(link), ranks=n, hop=args.hop * 1e-6)
            for n in counts
        ]
        for link in args.predict
        for name in EXCHANGES
        if name != "none"
    }
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in curves.items()]
    return table(["exchange, link of each rank", *(f"{n:,}" for n in counts)], rows), curves


def draw(path: Path, title: str, curves: dict[str, list[float]]) -> None:
    """The extrapolation as a figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for i, (name, values) in enumerate(curves.items()):
        style = {"dense": "-", "sparse 60%": "--", "sparse 90%": ":"}[name.split(",")[0]]
        axes.plot([2**n for n in range(1, 11)], values, style, color=f"C{i // 3}", label=name)
    axes.set(xscale="log", xlabel="ranks", ylabel="share of the speed without exchange", ylim=(0, 1.02), title=title)
    axes.set_xticks([2**n for n in range(1, 11)], [str(2**n) for n in range(1, 11)])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, fit, compare, extrapolate; print the tables, write every figure."""
    parser = arguments(__doc__)
    parser.add_argument("--fit", nargs="+", default=["10gbit", "1gbit"], help="links that the model is fitted to")
    parser.add_argument("--held-out", nargs="+", default=["300mbit", "100mbit"], help="links that it must predict")
    parser.add_argument("--predict", nargs="+", default=["10gbit", "1gbit"], help="links of the table to 1,024 ranks")
    parser.add_argument("--hop", type=float, default=50, help="assumed microseconds of one message of the ring")
    args = parser.parse_args()
    parts, content = [], {}
    for depth in args.depth:
        local, local_seconds = on_this_machine(args, depth)
        link_seconds, sizes = on_links(args, depth)
        linked, model = compare(args, link_seconds, sizes)
        beyond, curves = extrapolation(args, model, sizes)
        fitted = f"compute {1e3 * model.compute:.1f} ms, " + ", ".join(
            f"{kind} {1e3 * value:+.1f} ms" for kind, value in model.fixed.items()
        )
        parts += [
            f"ResNet-{depth}, batch {args.batch}, {args.steps} steps x {args.rounds} rounds\n\n{local}",
            f"Two hosts; fitted: {fitted}, {1e9 * model.a_byte:+.2f} ns a byte\n\n{linked}",
            f"Of the model, with {args.hop:g} us a message (assumed, not measured)\n\n{beyond}",
        ]
        content[str(depth)] = {"local": local_seconds, "links": link_seconds, "bytes": sizes, "model": vars(model)}
        if args.out is not None:
            draw(args.out.with_suffix(".png"), f"ResNet-{depth}, batch {args.batch} a rank: model", curves)
    report(args.out, "\n\n".join(parts), {"batch": args.batch, "hop_microseconds": args.hop, "runs": content})


if __name__ == "__main__":
    sys.exit(main())
