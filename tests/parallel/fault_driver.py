"""Brings faults to jobs, one after the other, and compares the results with those of an undisturbed run.

Usage: python tests/parallel/fault_driver.py FAULTS [SEED]     prints the table of docs/reliability.md
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
from horovod.runner.http.http_server import RendezvousServer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from cnnopt.run import checkpoint  # noqa: E402

RANKS = 2
SAVE_EVERY = 7
FLAGS = [
    *("--dataset", "synthetic", "--depth", "8", "--batch-size", "16", "--epochs", "4", "--precision", "float32"),
    *("--save-every", f"{SAVE_EVERY}s", "--deterministic", "--name", "run"),
]
# As horovodrun does: SIGTERM to the other ranks when one has failed, and SIGKILL to those still there after a time.
# It waits 5 s, which a busy machine may need for less.
GRACE = 30.0
# Of Gloo, for a message from another rank, 30 by default; and of a step, 300 by default. A disk may be slow to save.
TIMEOUTS = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "15", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "15"}


@dataclass(frozen=True)
class Fault:
    """What happens to which rank: ``at`` is a second of the start, a step, or a number of a file's sync in saves."""

    kind: str
    rank: int
    where: str
    at: float
    delay: float = 0.0


KINDS = (
    ("kill", "step"), ("SIGTERM", "step"), ("kill", "save"), ("stop", "step"), ("SIGUSR1", "step"),
    ("kill", "start"), ("twice", "step"), ("SIGTERM", "start"), ("hang", "step"), ("SIGTERM", "step"),
)  # fmt: skip


def fault_of(seed: int, done: int) -> Fault:
    """The fault that seed ``seed`` brings to a run that goes on after ``done`` steps."""
    draw = random.Random(seed)
    kind, where = KINDS[seed % len(KINDS)]
    # No rank is taken for hanging in its first step, which compiles.
    first = 1 if kind == "hang" else 0
    at = {"step": done + draw.randint(first, 15), "save": draw.randint(0, 12), "start": draw.uniform(0, 4)}[where]
    return Fault(kind, 0 if where == "save" else draw.randrange(RANKS), where, at, draw.uniform(0, 0.06))


@dataclass
class End:
    """How a job ended: exit statuses by rank (negative: by that signal), and what it took."""

    statuses: list[int]
    output: str
    steps: int
    saves: int
    seconds: float
    killed: list[int] = field(default_factory=list)


class Jobs:
    """Starts jobs of RANKS ranks in ``folder``, forked from one process (fault_ranks.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "parent.txt").open("w") as log:
            self.parent = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fault_ranks.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.slots = get_host_assignments(parse_hosts(f"localhost:{RANKS}"), RANKS)

    def close(self) -> None:
        self.parent.stdin.close()
        try:
            self.parent.wait(60)
        except subprocess.TimeoutExpired:
            self.parent.kill()
        self.parent.stdout.close()

    def _ask(self, line: str) -> list:
        self.parent.stdin.write(line + "\n")
        self.parent.stdin.flush()
        answer = self.parent.stdout.readline()
        assert answer, (self.folder / "parent.txt").read_text()
        return json.loads(answer)

    def run(self, run_dir: Path, fault: Fault | None, environment: dict[str, str] | None = None) -> End:
        """One job from its start to its end, with the launcher's part played as horovodrun plays it."""
        server = RendezvousServer()
        common = create_run_env_vars("127.0.0.1", ["lo"], server.start())
        server.init(self.slots)
        given = {**TIMEOUTS, **(environment or {})}
        variables = [{k: str(v) for k, v in {**common, **create_slot_env_vars(s), **given}.items()} for s in self.slots]
        log, events = self.folder / "output.txt", self.folder / "events.txt"
        for path in (log, events):
            path.write_text("")
        job = {"argv": [*FLAGS, "--run-dir", str(run_dir)], "environment": variables, "log": str(log),
               "events": str(events), "fault": asdict(fault) if fault else {}}  # fmt: skip
        try:
            stopped = fault.rank if fault and fault.kind in ("stop", "hang") else None
            statuses, killed, seconds = self._wait(self._ask(json.dumps(job)), stopped)
        finally:
            server.stop()
            # stop() leaves the socket open.
            server._httpd.server_close()
        lines = events.read_text().splitlines()
        steps = [int(line.split()[1]) for line in lines if line.startswith("step")]
        saves = sum(line.startswith("save") for line in lines)
        return End(statuses, log.read_text(errors="replace"), max(steps, default=0), saves, seconds, killed)

    def _wait(self, pids: list[int], stopped: int | None) -> tuple[list[int], list[int], float]:
        ended: dict[int, int] = {}
        killed: list[int] = []
        failed_at, started = None, time.monotonic()
        while len(ended) < len(pids):
            time.sleep(0.05)
            ended |= {pid: os.waitstatus_to_exitcode(status) for pid, status in self._ask("")}
            now, alive = time.monotonic(), [pid for pid in pids if pid not in ended]
            if failed_at is None and any(ended.values()):
                failed_at = now
                for pid in alive:
                    os.kill(pid, signal.SIGTERM)
            only_stopped = failed_at and stopped is not None and alive == [pids[stopped]]
            if alive and (only_stopped or (failed_at and now - failed_at > GRACE) or now - started > 900):
                killed = [pids.index(pid) for pid in alive]
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
        return [ended[pid] for pid in pids], killed, time.monotonic() - (failed_at or started)


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in checkpoint.list_steps(run_dir / "run/checkpoints")), default=0)


def outcome(run_dir: Path) -> dict:
    """What a complete run has left: its lines, without what the clock says, and its last state."""
    lines = [json.loads(line) for line in (run_dir / "run/metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second", "step_seconds", "exchange_share")
    return {
        "lines": [{name: value for name, value in line.items() if name not in clock} for line in lines],
        "arrays": checkpoint.load(checkpoint.list_steps(run_dir / "run/checkpoints")[-1]).arrays,
    }


def lost(found: dict, wanted: dict) -> list[str]:
    """The results in which a disturbed run differs from the undisturbed one."""
    names = [f"array {n}" for n, a in wanted["arrays"].items() if a.tobytes() != found["arrays"][n].tobytes()]
    if len(found["lines"]) != len(wanted["lines"]):
        return [*names, f"{len(found['lines'])} lines of {len(wanted['lines'])}"]
    for one, other in zip(found["lines"], wanted["lines"], strict=True):
        for name, value in one.items():
            # Training loss and accuracy are sums over the steps of an epoch, which a resume adds in another order.
            tolerance = 1e-5 if name in ("loss", "accuracy") else 0
            if not np.isclose(value, other[name], rtol=tolerance, atol=0):
                names.append(f"epoch {other['epoch']}: {name}")
    return names


def check(fault: Fault, end: End, before: int, after: int) -> str | None:
    """What is wrong with how a job ended; its newest checkpoints before it started and after it ended."""
    if not any(end.statuses):
        return "it ended with 0"
    if end.killed != ([fault.rank] if fault.kind in ("stop", "hang") else []):
        return f"ranks {end.killed} had to be killed"
    if "Traceback" in end.output:
        return "it left a traceback"
    if fault.kind in ("kill", "stop", "hang") and end.steps:
        if f"rank {fault.rank} (host" not in end.output:
            return "the rank is not named"
        if any(status != 1 for rank, status in enumerate(end.statuses) if rank != fault.rank):
            return "another rank did not end with 1"
    if fault.kind in ("SIGTERM", "SIGUSR1", "twice"):
        # Python takes no more signals once it ends, so the launcher's may end a rank that is done. Before the first
        # step the rank that was told ends at once, and another may miss it before the launcher comes to it.
        allowed = {75, -signal.SIGTERM} if end.steps else {75, -signal.SIGTERM, 1}
        if 75 not in end.statuses or not set(end.statuses) <= allowed:
            return "it did not end with 75"
        if end.steps and after != end.steps:
            return f"it saved step {after} of {end.steps}"
    if after < before or end.steps - after > SAVE_EVERY:
        return f"it lost steps {after} to {end.steps}"
    return None


@dataclass
class Tally:
    """What the table is made of."""

    faults: Counter = field(default_factory=Counter)
    saves: int = 0
    resumes: int = 0
    repeated: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    runs: int = 0
    results_lost: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = {
            "faults": f"{sum(self.faults.values())} ({', '.join(f'{n} {kind}' for kind, n in self.faults.items())})",
            "saves": self.saves,
            "resumes": self.resumes,
            "steps repeated": f"{sum(self.repeated)}, at most {max(self.repeated, default=0)} after one fault; "
            f"a save is due every {SAVE_EVERY}",
            "runs completed": self.runs,
            "results lost": self.results_lost,
            "longest from the first rank's end to the job's": f"{max(self.seconds, default=0):.1f} s",
            "wrong endings": len(self.wrong),
        }
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def soak(faults: int, first_seed: int, folder: Path, tell=lambda text: None) -> Tally:
    """Bring ``faults`` faults to runs, each resumed until it is complete."""
    tally, jobs = Tally(), Jobs(folder)
    try:
        undisturbed = jobs.run(folder / "undisturbed", None)
        assert undisturbed.statuses == [0] * RANKS, undisturbed.output
        wanted = outcome(folder / "undisturbed")
        seed, last = first_seed, first_seed + faults
        while seed < last:
            run_dir = folder / f"run{seed}"
            try:
                disturb(jobs, run_dir, range(seed, last), wanted, tally, tell)
            except Exception:
                # A run that this program cannot judge is a failure too, and the next one begins anew.
                tally.wrong.append(f"run {seed}: the driver itself failed: {traceback.format_exc()}")
                tell(tally.wrong[-1])
                tally.faults["given up"] += 1
                jobs.close()
                jobs = Jobs(folder)
            seed = first_seed + sum(tally.faults.values())
            shutil.rmtree(run_dir, ignore_errors=True)
    finally:
        jobs.close()
    return tally


def disturb(jobs: Jobs, run_dir: Path, seeds: range, wanted: dict, tally: Tally, tell) -> None:
    """Bring the faults of ``seeds``, or the first of them, to one run, until it is complete."""
    seed = seeds.start
    while True:
        before = saved_step(run_dir)
        fault = fault_of(seed, before) if seed in seeds else None
        end = jobs.run(run_dir, fault)
        tally.saves += end.saves
        tally.resumes += "resumed after step" in end.output
        if before and end.steps and f"resumed after step {before} " not in end.output:
            tally.wrong.append(f"seed {seed}: it did not resume after step {before}")
        if not any(end.statuses):
            break
        after = saved_step(run_dir)
        assert fault is not None, end.output
        tally.faults[f"{fault.kind} in a {fault.where}"] += 1
        tally.repeated.append(max(0, end.steps - after))
        tally.seconds.append(end.seconds)
        if wrong := check(fault, end, before, after):
            tally.wrong.append(f"seed {seed}, {fault}: {wrong}: {end.statuses}\n{end.output}")
        tell(f"seed {seed}: {fault}: {end.statuses}, step {end.steps}, saved {after}, {end.seconds:.1f} s")
        seed += 1
    tally.runs += 1
    tally.results_lost += len(differing := lost(outcome(run_dir), wanted))
    tell(f"run complete, lost: {differing}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        result = soak(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, Path(name), print)
    print("\n".join(["", *result.wrong, str(result)]))
    sys.exit(bool(result.wrong or result.results_lost))
