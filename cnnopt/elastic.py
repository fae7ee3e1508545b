"""Train on hosts that come and go: the run starts again on the hosts that are there, from its last checkpoint.

    python -m cnnopt.elastic --max-np 4 --host-discovery-script ./hosts.sh ...

The script prints a line ``host:slots`` for each host, as for horovodrun. The run uses the largest number of ranks that
divides the global batch, so that the batch stays the same. The other flags are those of train_hvd.py. Exit status:
0 complete, 1 three starts in a row have saved nothing or --elastic-timeout is over, 2 wrong input, 75 told to stop, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnnopt.command_line import Parser, one_line
from cnnopt.config import ConfigError, TrainConfig, parse_args
from cnnopt.errors import RunError
from cnnopt.output import outlive_readers
from cnnopt.run import checkpoint
from cnnopt.run.run_folder import RunFolder

#: Starts in a row that may end without a new checkpoint.
FRUITLESS = 3
#: Seconds between two looks at the hosts.
INTERVAL = 1.0
#: Seconds that ranks and launcher have to end after they were told to.
GRACE = 60.0
TRAIN = Path(__file__).parents[1] / "train_hvd.py"
SSH = ("ssh", "-n", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "ConnectTimeout=5")


def discover(script: str) -> dict[str, int]:
    """The hosts and their slots, as ``script`` prints them. Raises ConfigError if the script cannot be run."""
    try:
        done = subprocess.run([os.path.expanduser(script)], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise ConfigError(f"--host-discovery-script {script}: {error.strerror}; name a program") from None
    except (ValueError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"--host-discovery-script {script}: {error}; it must print lines host:slots") from None
    if done.returncode:
        raise ConfigError(f"--host-discovery-script {script}: ended with {done.returncode}: {done.stderr.strip()}")
    found = {}
    for line in filter(None, map(str.strip, done.stdout.splitlines())):
        match = re.fullmatch(r"([\w.-]+)(?::(\d+))?", line)
        if match is None:
            raise ConfigError(f"--host-discovery-script {script}: printed '{line}'; it must print lines host:slots")
        found[match[1]] = int(match[2] or 1)
    return found


def ranks_on(hosts: dict[str, int], batch_size: int, most: int) -> int:
    """The largest number of ranks that fits on ``hosts`` and divides the batch. 0 without slots."""
    fitting = min(most, sum(hosts.values()))
    return max((ranks for ranks in range(1, fitting + 1) if batch_size % ranks == 0), default=0)


def places_of(hosts: dict[str, int], ranks: int) -> dict[str, int]:
    """Hosts with ``ranks`` slots in total, because horovodrun starts a rank on every slot, whatever -np says."""
    places: dict[str, int] = {}
    for host, slots in hosts.items():
        if taken := min(slots, ranks):
            places[host] = taken
        ranks -= taken
    return places


def changed(hosts: dict[str, int], places: dict[str, int], batch_size: int, most: int) -> bool:
    """True if a run on ``places`` has lost one of its slots, or would now have another number of ranks."""
    lost = any(hosts.get(host, 0) < taken for host, taken in places.items())
    return lost or ranks_on(hosts, batch_size, most) != sum(places.values())


def newest(config: TrainConfig) -> int:
    """The step of the newest checkpoint, unverified. -1 without a checkpoint."""
    paths = checkpoint.list_steps(RunFolder.of(config).checkpoints)
    return int(paths[-1].name.rpartition("-")[2]) if paths else -1


def find_horovodrun() -> str:
    """The horovodrun of this Python, else the first on PATH. Raises ConfigError if there is none."""
    beside = Path(sys.executable).with_name("horovodrun")
    found = str(beside) if beside.exists() else shutil.which("horovodrun")
    if found is None:
        raise ConfigError("horovodrun: not found; activate the environment that has Horovod (docs/install.md)")
    return found


def train(options: argparse.Namespace, config: TrainConfig, flags: Sequence[str]) -> int:
    """Start the run as often as needed. Returns the exit status."""
    horovodrun, hosts, fruitless = find_horovodrun(), discover(options.host_discovery_script), 0
    waiting_since: float | None = None
    while True:
        ranks = ranks_on(hosts, config.batch_size, options.max_np)
        if ranks < options.min_np:
            slots = f"{sum(hosts.values())} slots, of which {ranks} divide --batch-size {config.batch_size}"
            if waiting_since is None:
                waiting_since = time.monotonic()
                print(f"cnnopt.elastic: waiting for --min-np {options.min_np}: {slots}", flush=True)
            elif time.monotonic() - waiting_since > options.elastic_timeout:
                raise RunError(
                    f"--min-np {options.min_np}: {slots}, after {options.elastic_timeout:g} s; give a longer "
                    "--elastic-timeout, and the same command goes on"
                )
            time.sleep(INTERVAL)
            hosts = look_again(options.host_discovery_script, hosts)
            continue
        waiting_since = None
        before = newest(config)
        places = places_of(hosts, ranks)
        listed = ",".join(f"{host}:{slots}" for host, slots in places.items())
        print(f"cnnopt.elastic: {ranks} ranks on {listed}, after step {max(before, 0)}", flush=True)
        # No cache, because hosts come and go, and because the cache is in HOME, which may be read-only.
        launcher = [horovodrun, "--gloo", "--disable-cache", "-np", str(ranks), "-H", listed]
        program = Program.marked()
        # The job gets a new session, so a terminal's Ctrl-C reaches only this process, which ends the job.
        with subprocess.Popen([*launcher, *program.command, *flags], start_new_session=True) as process:
            job = Job(process, program, tuple(places))
            try:
                moved = watch(job, options, places, config.batch_size)
            except BaseException:
                job.end()
                raise
        # horovodrun may return 0 after it was told to end its ranks (docs/reliability.md, "Exit status").
        if process.returncode == 0 and not moved and RunFolder.of(config).result() is not None:
            return 0
        # A start that a change of hosts has cut short does not count as fruitless.
        fruitless = 0 if newest(config) > before else fruitless + (not moved)
        if fruitless == FRUITLESS:
            raise RunError(f"{FRUITLESS} starts in a row ended without a new checkpoint: see their messages above")
        hosts = look_again(options.host_discovery_script, hosts)


def look_again(script: str, last: dict[str, int]) -> dict[str, int]:
    """The hosts that are there now. ``last`` if the script fails, because it worked before and may work again."""
    try:
        return discover(script)
    except ConfigError:
        return last


@dataclass(frozen=True)
class Program:
    """The command of a rank, and the pattern by which pkill finds the ranks of one start, and nothing else."""

    command: tuple[str, ...]
    pattern: str

    @classmethod
    def marked(cls) -> Program:
        """A new command. Python ignores the mark: it is an option -X that Python does not know."""
        command = (sys.executable, "-X", f"cnnopt-start={secrets.token_hex(8)}", str(TRAIN))
        # Without the ^, it would also fit the shells in which horovodrun starts a rank.
        return cls(command, "^" + re.escape(" ".join(command)))


@dataclass(frozen=True)
class Job:
    """One start of horovodrun, and the ranks that it has started on ``hosts``."""

    process: subprocess.Popen
    program: Program
    hosts: tuple[str, ...]

    def end(self) -> None:
        """Tell the ranks to save and end. What has not ended after ``GRACE`` seconds is killed.

        horovodrun hands a signal on to the ranks of this host alone. It is enough to tell one rank: all then stop after
        the same step.
        """
        if not any(self._signal("TERM")):
            # No rank has begun yet, or no host can be reached.
            self.process.terminate()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            list(self._signal("KILL"))
            os.killpg(self.process.pid, signal.SIGKILL)

    def _signal(self, name: str) -> Iterable[bool]:
        """Send a signal to the ranks of this host, then of each other one. Yields whether there was one."""
        pkill = ["pkill", f"-{name}", "-f", "--", self.program.pattern]
        for shell in ([], *([*SSH, host] for host in self.hosts)):
            command = [*shell, shlex.join(pkill)] if shell else pkill
            try:
                yield subprocess.run(command, capture_output=True, timeout=30).returncode == 0
            # Neither pkill nor ssh is certain to be there.
            except (OSError, subprocess.TimeoutExpired):
                yield False


def watch(job: Job, options: argparse.Namespace, places: dict[str, int], batch_size: int) -> bool:
    """Wait for ``job`` to end. If its places would now differ, end the job, which saves, and return True."""
    hosts = places
    while job.process.poll() is None:
        time.sleep(INTERVAL)
        hosts = look_again(options.host_discovery_script, hosts)
        if changed(hosts, places, batch_size, options.max_np) and job.process.poll() is None:
            job.end()
            return True
    return False


def parser() -> Parser:
    """The parser of this command. The flags of train_hvd.py are not in it."""
    made = Parser(
        prog="python -m cnnopt.elastic",
        usage="%(prog)s --max-np N --host-discovery-script PROGRAM\n           [--min-np N] [--elastic-timeout S] "
        "FLAGS OF train_hvd.py",
        description=__doc__,
    )
    made.add_argument("--min-np", type=int, default=1, metavar="N", help="wait until this many ranks fit [1]")
    made.add_argument("--max-np", type=int, required=True, metavar="N", help="most ranks")
    made.add_argument(
        "--elastic-timeout", type=float, default=600, metavar="S", help="wait no longer than this for --min-np [600]"
    )
    made.add_argument("--host-discovery-script", required=True, metavar="PROGRAM", help="prints lines host:slots")
    return made


@one_line("cnnopt.elastic")
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Every expected failure prints one line and has an exit status."""
    options, flags = parser().parse_known_args(argv)
    if not 1 <= options.min_np <= options.max_np:
        raise ConfigError(f"--min-np {options.min_np} --max-np {options.max_np}: must be 1 or more, and in order")
    config = parse_args(flags)
    # A closing terminal sends SIGHUP. nohup starts this process with SIGHUP ignored. Leave it ignored.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit(os.EX_TEMPFAIL))
    return train(options, config, flags)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
