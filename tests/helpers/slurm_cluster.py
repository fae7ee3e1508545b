"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, in a temporary folder, on free ports."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.helpers import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
INSTALL = "sudo apt-get install slurm-wlm munge"

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as its credentials last, and a busy machine starts none once they are over.
AuthInfo=socket={folder}/munge.socket,cred_expire=20
MessageTimeout=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,default_queue_depth=50
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=60
OverTimeLimit=1
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def missing() -> str | None:
    """The reason why SLURM cannot run here, or None if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"no {', '.join(absent)} here: {INSTALL}" if absent else None


def until(done: Callable[[], object], what: Callable[[], str], timeout: float = 240) -> None:
    end = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < end, what()
        time.sleep(0.3)


class Cluster:
    """Starts and ends the daemons, submits and inspects jobs. ``environment`` is a user's at the login node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The repository as a user has it, but with separate folders for logs and runs.
        self.home = folder / "cnnopt"
        (self.home / "logs").mkdir(parents=True)
        for name in ("cnnopt", "slurm", "train_hvd.py"):
            (self.home / name).symlink_to(ROOT / name)
        (self.home / ".venv").symlink_to(sys.prefix)
        host = socket.gethostname().partition(".")[0]
        self.nodes = ("n1", "n2")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "HOROVOD_"))},
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self.daemons: dict[str, subprocess.Popen] = {}
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            for s in (a, b, c):
                s.bind(("127.0.0.1", 0))
            ports = [s.getsockname()[1] for s in (a, b, c)]
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir()
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        text = CONFIG.format(host=host, ports=ports, folder=folder, user=user, nodes=self.nodes)
        (folder / "slurm.conf").write_text(text)
        # SLURM wants devices for GPUs, and numbers them by the devices' names. TensorFlow finds no GPU.
        for number in range(2):
            (folder / f"gpu{number}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "cgroup.conf").write_text("")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)

    def start(self) -> None:
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        self._daemon("munged", "--foreground", "--force", *files)
        until((self.folder / "munge.socket").exists, self._logs, 30)
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == "2", self._logs, 120)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def _daemon(self, program: str, *arguments: str, name: str | None = None) -> None:
        with (self.folder / f"{name or program}.out").open("a") as output:
            self.daemons[name or program] = subprocess.Popen(
                [program, *arguments], env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def stop(self) -> None:
        """End all jobs, then the daemons in the reverse order of their start."""
        try:
            if jobs := self.jobs():
                self.run("scancel", "--signal=KILL", "--full", *jobs)
                self.run("scancel", *jobs)
            until(lambda: not self.jobs(), lambda: "jobs do not end", 120)
        finally:
            for daemon in reversed(self.daemons.values()):
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user does, in the repository on the login node."""
        environment = {**self.environment, **variables}
        return subprocess.run(command, env=environment, cwd=self.home, capture_output=True, text=True, timeout=150)

    def submit(self, *arguments: str, **variables: str) -> "Job":
        done = self.run("sbatch", "--parsable", *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return self.job(done.stdout.strip())

    def job(self, number: str) -> "Job":
        return Job(self, number)

    def jobs(self) -> list[str]:
        return self.run("squeue", "-h", "-o", "%A").stdout.split()

    def _logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.out")))


class Job:
    """A job of the cluster, by its number."""

    def __init__(self, cluster: Cluster, number: str) -> None:
        self.cluster, self.number = cluster, number

    def show(self, field: str) -> str:
        shown = self.cluster.run("scontrol", "show", "job", self.number).stdout
        # The result is empty if the daemon did not answer.
        return next((part.partition("=")[2] for part in shown.split() if part.startswith(f"{field}=")), "")

    def log(self) -> str:
        logs = (self.cluster.home / "logs").glob(f"*-{self.number}.out")
        return "".join(path.read_text(errors="replace") for path in logs)

    def wait_for(self, text: str, timeout: float = 480) -> None:
        until(lambda: text in self.log(), lambda: f"no '{text}' in: {self.log()}", timeout)

    def wait(self, timeout: float = 600) -> str:
        """Wait until the job has ended. Returns the last state: COMPLETED, FAILED, ..."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        until(lambda: self.show("JobState") in ended, lambda: f"{self.show('JobState')}: {self.log()}", timeout)
        return self.show("JobState")

    def ranks(self, node: str) -> list[psutil.Process]:
        """The training processes of this job on a node."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if "train_hvd.py" not in process.cmdline() or "srun" in process.name():
                    continue
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if (
                environment.get("SLURM_CONF") == self.cluster.environment["SLURM_CONF"]
                and (environment.get("SLURM_JOB_ID"), environment.get("SLURMD_NODENAME")) == (self.number, node)
                and "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environment
            ):
                found.append(process)
        return found
