"""Start ranks for Horovod's Gloo on this machine: side by side, or each on its own "host" with a limited link.

A host is a network namespace with its own name, joined to a bridge by a link that ``tc tbf`` limits in both directions.
It needs neither ssh nor a launcher: Horovod needs a few variables and a rendezvous server on the first host.

Usage, by ``start`` alone: python benchmarks/hosts.py HOST... serves the rendezvous of ranks on these hosts.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from side_by_side import ROOT, Contestant, open_log


class Hosts:
    """``count`` namespaces with the addresses 10.77.0.1 and up; with 0 of them, this machine as it is."""

    def __init__(self, count: int) -> None:
        self.names = [f"cnnopt{i}" for i in range(count)]

    @property
    def addresses(self) -> list[str]:
        """The address of each host."""
        return [f"10.77.0.{i + 1}" for i in range(len(self.names))] or ["127.0.0.1"]

    def enter(self, host: int) -> list[str]:
        """The prefix of a command line that runs the rest on ``host``."""
        if not self.names:
            return []
        name = self.names[host]
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]

    def limit(self, rate: str) -> None:
        """Limit the link of each host to ``rate``, such as 1gbit, in both directions."""
        # A burst is the bytes of 5 ms, and at least one TCP segment.
        burst = max(65536, int(bits_per_second(rate) / 8 / 200))
        for i, name in enumerate(self.names):
            limit = ["root", "tbf", "rate", rate, "burst", str(burst), "latency", "200ms"]
            _run("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "eth0", *limit)
            _run("tc", "qdisc", "replace", "dev", f"cnnopt-v{i}", *limit)

    def sent_bytes(self, host: int) -> int:
        """Bytes that ``host`` has sent since its start, with the headers of TCP, IP and Ethernet."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        done = subprocess.run(
            ["ip", "netns", "exec", self.names[host], "cat", path], capture_output=True, text=True, check=True
        )
        return int(done.stdout)


def bits_per_second(rate: str) -> float:
    """Bits a second from ``tc``'s notation: 10gbit, 100mbit."""
    return float(rate.rstrip("gmbit")) * {"g": 1e9, "m": 1e6}[rate.lstrip("0123456789.")[0]]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """``count`` namespaces, removed in the end. Needs root, ``ip`` and ``tc``."""
    if os.geteuid():
        sys.exit("network namespaces need root: run this with sudo")
    made = Hosts(count)
    # If another benchmark has the namespace, this one ends and leaves it alone.
    _run("ip", "link", "add", "cnnopt-br", "type", "bridge")
    try:
        _run("ip", "link", "set", "cnnopt-br", "up")
        for i, name in enumerate(made.names):
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", f"cnnopt-v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", f"cnnopt-v{i}", "master", "cnnopt-br", "up")
            for command in (f"addr add {made.addresses[i]}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _run("ip", "-n", name, *command.split())
            # Gloo binds the address that the host's own name resolves to; it must not be 127.0.0.1.
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            known = "".join(f"{address} {other}\n" for address, other in zip(made.addresses, made.names, strict=True))
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        yield made
    finally:
        for name in made.names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
            with contextlib.suppress(OSError):
                (Path("/etc/netns") / name / "hosts").unlink()
                (Path("/etc/netns") / name).rmdir()
        subprocess.run(["ip", "link", "del", "cnnopt-br"], stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def start(
    name: str, command: Sequence[str], ranks: int, *, on: Hosts | None = None, horovod: bool = True,
    pinned: bool = True, python: str = sys.executable, environment: Mapping[str, str] | None = None,
) -> Iterator[Contestant]:  # fmt: skip
    """Ranks that run ``command``, each with its share of the cores: rank i on host i of ``on``, or all of them here.

    Without ``horovod`` they get no rendezvous server; not ``pinned`` they have all cores, and no word of threads.
    """
    on = on or Hosts(0)
    where = on.names or ["localhost"]
    processes: list[subprocess.Popen[str]] = []
    try:
        port = "0"
        if horovod:
            serve = [*on.enter(0), sys.executable, __file__, *(where if on.names else where * ranks)]
            processes.append(subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            assert processes[0].stdout is not None
            port = processes[0].stdout.readline().strip()
        cores = sorted(os.sched_getaffinity(0))
        contestants = []
        for rank in range(ranks):
            local, locals_ = (0, 1) if on.names else (rank, ranks)
            variables = {
                "RANK": rank, "SIZE": ranks, "LOCAL_RANK": local, "LOCAL_SIZE": locals_,
                "CROSS_RANK": rank if on.names else 0, "CROSS_SIZE": ranks if on.names else 1,
                "HOSTNAME": where[rank % len(where)],
                "GLOO_RENDEZVOUS_ADDR": on.addresses[0], "GLOO_RENDEZVOUS_PORT": port,
                "CONTROLLER": "gloo", "CPU_OPERATIONS": "gloo", "GLOO_TIMEOUT_SECONDS": 3600,
            }  # fmt: skip
            # If there are more ranks than cores, they share the cores in turn.
            share = slice(rank * len(cores) // ranks, (rank + 1) * len(cores) // ranks)
            mine = cores[share] if ranks <= len(cores) else [cores[rank % len(cores)]]
            pin = ["taskset", "-c", ",".join(map(str, mine))] if pinned else []
            # Each rank already has its share of the cores; cnnopt would divide them again.
            threads = {"TF_NUM_INTRAOP_THREADS": str(len(mine))} if pinned else {}
            kept = {name: value for name, value in os.environ.items() if pinned or not name.endswith("_THREADS")}
            contestants.append(
                subprocess.Popen(
                    [*on.enter(rank), *pin, python, *command],
                    env={**kept, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", **threads, **(environment or {}),
                         **{f"HOROVOD_{key}": str(value) for key, value in variables.items()}},
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open_log(name, rank), text=True,
                )
            )  # fmt: skip
            processes.append(contestants[-1])
        yield Contestant(name, contestants, restless=horovod)
    finally:
        Contestant(name, processes).end()


def main() -> None:
    """Print the port of a rendezvous server for one rank on each of the hosts, and serve until the input ends."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    slots = {host: sys.argv[1:].count(host) for host in sys.argv[1:]}
    server = RendezvousServer()
    port = server.start()
    server.init(get_host_assignments(parse_hosts(",".join(f"{h}:{n}" for h, n in slots.items())), len(sys.argv) - 1))
    print(port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
