"""Print how to start one run with each launcher.

    python -m cnnopt.launch_plan --nodes 2 --gpus-per-node 4 -- --depth 44
    python -m cnnopt.launch_plan --nodes 4 --ranks-per-node 2 -- --preset super
    python -m cnnopt.launch_plan --only kubernetes -- --preset super > my.yaml

Prints the horovodrun line, the sbatch command and two kustomize overlays, for the MPI Operator and for Kubeflow
Trainer. All have the same ranks and the same flags of train_hvd.py, which are checked first. Standard library only.
Exit status: 0 done, 2 wrong input.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cnnopt.command_line import Parser, one_line
from cnnopt.config import TrainConfig, parse_args
from cnnopt.errors import UserError
from cnnopt.output import need_readers


class PlanError(UserError):
    """A job size is impossible. The message is one line that names the flag and the remedy."""


@dataclass(frozen=True)
class Plan:
    """The size of a job and the configuration that it trains."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_rank: int
    flags: tuple[str, ...]
    config: TrainConfig

    @property
    def ranks(self) -> int:
        """All ranks of the job."""
        return self.nodes * self.ranks_per_node


def horovodrun(plan: Plan) -> str:
    """The command for this machine, or for hosts named node1, node2, ... with ssh between them."""
    hosts = ",".join(f"node{i + 1}:{plan.ranks_per_node}" for i in range(plan.nodes))
    command = ["horovodrun", "-np", str(plan.ranks), *(["-H", hosts] if plan.nodes > 1 else [])]
    return shlex.join([*command, "python", "train_hvd.py", *plan.flags, "--expect-ranks", str(plan.ranks)])


def sbatch(plan: Plan) -> str:
    """The command for SLURM. The script takes all counts from the command, ``--expect-ranks`` included."""
    size = [
        f"--nodes={plan.nodes}",
        f"--ntasks-per-node={plan.ranks_per_node}",
        f"--cpus-per-task={plan.cpus_per_rank}",
    ]
    if plan.gpus_per_node:
        size.append(f"--gpus-per-node={plan.gpus_per_node}")
    # The script starts from --preset super. The command names each setting in which this run differs.
    preset = parse_args(["--preset", "super", *plan.flags]).identity()
    said = [f"--{k.replace('_', '-')}={v}" for k, v in plan.config.identity().items() if preset[k] != v]
    return shlex.join(["sbatch", *size, "slurm/super.sbatch", *plan.flags, *said])


def mpijob(plan: Plan) -> str:
    """An overlay for the MPI Operator, beside those of k8s/overlays: one worker on each node."""
    replicas = "/spec/mpiReplicaSpecs"
    launcher = f"{replicas}/Launcher/template/spec/containers/0"
    worker = f"{replicas}/Worker/template/spec/containers/0"
    job = {
        "/spec/slotsPerWorker": plan.ranks_per_node,
        f"{replicas}/Worker/replicas": plan.nodes,
        f"{launcher}/args": _arguments(plan),
        f"{launcher}/env/0/value": str(plan.cpus_per_rank),
        **_launcher_memory(plan, launcher),
        **_resources(plan, worker),
    }
    return _kustomization(plan, {"MPIJob": job})


def trainjob(plan: Plan) -> str:
    """An overlay for Kubeflow Trainer: the TrainJob has the flags, and its runtime has the size of a node."""
    job = {
        "/spec/trainer/numNodes": plan.nodes,
        "/spec/trainer/numProcPerNode": plan.ranks_per_node,
        "/spec/trainer/args": _arguments(plan),
        "/spec/trainer/env/0/value": str(plan.cpus_per_rank),
    }
    node, launcher = (
        f"/spec/template/spec/replicatedJobs/{i}/template/spec/template/spec/containers/0" for i in (0, 1)
    )
    runtime = {**_launcher_memory(plan, launcher), **_resources(plan, node)}
    # Trainer refuses a TrainJob whose runtime is not there yet. By default kustomize puts the TrainJob first.
    more = ["components:", "  - ../../trainjob", "sortOptions: {order: fifo}"]
    return _kustomization(plan, {"TrainJob": job, "TrainingRuntime": runtime}, *more)


def _arguments(plan: Plan) -> list[str]:
    # The volumes' paths come last, to override paths of other machines in the flags.
    data = ["--data-dir=/data"] if plan.config.data_dir else []
    return [*plan.flags, f"--name={plan.config.name}", *data, "--run-dir=/runs"]


def _launcher_memory(plan: Plan, container: str) -> dict[str, Any]:
    # horovodrun keeps a Python of 22 MB and an ssh for each rank. The 2 GiB of k8s/base are enough for 32 ranks.
    gibibytes = 1 + -(-plan.ranks // 32)
    paths = [f"{container}/resources/{bound}/memory" for bound in ("requests", "limits")]
    return {path: f"{gibibytes}Gi" for path in paths if gibibytes > 2}


def _resources(plan: Plan, container: str) -> dict[str, Any]:
    # As in k8s/base, for one rank on CPUs, and in k8s/overlays/gpu, for four GPUs. A rank on CPUs takes up to 2 GiB.
    memory = 16 * plan.gpus_per_node if plan.gpus_per_node else max(8, 2 * plan.ranks_per_node)
    size = {"cpu": str(plan.cpus_per_rank * plan.ranks_per_node), "memory": f"{memory}Gi"}
    if plan.gpus_per_node:
        size["nvidia.com~1gpu"] = str(plan.gpus_per_node)
    return {
        f"{container}/resources/{bound}/{name}": amount
        for bound in ("requests", "limits")
        for name, amount in size.items()
    }


def _kustomization(plan: Plan, jobs: dict[str, dict[str, Any]], *more: str) -> str:
    """The overlay cpu or gpu, with values put into the quantize Job and into the objects of each kind in ``jobs``.

    ``more``: further lines of the kustomization.
    """
    pod, run = "/spec/template/spec", f"/runs/{plan.config.name}"
    quantize = {
        f"{pod}/initContainers/0/command/2": f"until [ -e {run}/result.json ]; do sleep 15; done",
        f"{pod}/containers/0/args": [run, "--data-dir=/data"],
    }
    lines = [
        "apiVersion: kustomize.config.k8s.io/v1beta1",
        "kind: Kustomization",
        "resources:",
        f"  - ../{'gpu' if plan.gpus_per_node else 'cpu'}",
        *more,
        "patches:",
    ]
    for kind, name, values in (*((kind, "cnnopt", jobs[kind]) for kind in jobs), ("Job", "cnnopt-quantize", quantize)):
        lines += [f"  - target: {{kind: {kind}, name: {name}}}", "    patch: |-"]
        # JSON is valid YAML, and quotes all that a flag may hold.
        lines += [
            f"      - {json.dumps({'op': 'replace', 'path': path, 'value': value})}" for path, value in values.items()
        ]
    return "\n".join(lines)


#: The launchers, in the order in which they are printed.
LAUNCHERS = {"horovodrun": horovodrun, "slurm": sbatch, "kubernetes": mpijob, "trainjob": trainjob}


def parser() -> Parser:
    """The parser of this command. The flags of train_hvd.py are not in it."""
    made = Parser(
        prog="python -m cnnopt.launch_plan",
        description=__doc__,
        usage="%(prog)s [options] -- FLAGS OF train_hvd.py",
        stray="flags of train_hvd.py go after --",
    )
    made.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts, or workers of Kubernetes [1]")
    made.add_argument(
        "--gpus-per-node", type=int, default=0, metavar="N", help="GPUs on each node; each gets one rank [0]"
    )
    made.add_argument("--ranks-per-node", type=int, metavar="N", help="without GPUs [1]")
    made.add_argument("--cpus-per-rank", type=int, default=4, metavar="N", help="cores and threads of a rank [4]")
    made.add_argument("--only", choices=LAUNCHERS, help="print this launcher alone, ready for a file")
    return made


def parse_plan(argv: Sequence[str]) -> tuple[Plan, str | None]:
    """The plan that ``argv`` asks for, and the launcher of ``--only`` or None. train_hvd.py's flags follow ``--``.

    Raises UserError for a plan that is impossible.
    """
    at = list(argv).index("--") if "--" in argv else len(argv)
    flags = tuple(argv[at + 1 :])
    given = parser().parse_args(argv[:at])
    for flag, least in (("nodes", 1), ("gpus_per_node", 0), ("ranks_per_node", 1), ("cpus_per_rank", 1)):
        value = getattr(given, flag)
        if value is not None and value < least:
            raise PlanError(f"--{flag.replace('_', '-')} {value}: must be at least {least}")
    gpus, ranks = given.gpus_per_node, given.ranks_per_node or given.gpus_per_node or 1
    if gpus and ranks != gpus:
        raise PlanError(f"--ranks-per-node {ranks}: --gpus-per-node {gpus} means one rank for each; leave it out")
    plan = Plan(given.nodes, ranks, gpus, given.cpus_per_rank, flags, parse_args(flags))
    plan.config.check_ranks(plan.ranks)
    return plan, given.only


@one_line("cnnopt.launch_plan")
def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan. Every wrong input prints one line. Returns the exit status."""
    plan, only = parse_plan(sys.argv[1:] if argv is None else argv)
    if only:
        print(LAUNCHERS[only](plan))
        return 0
    print(f"# {plan.ranks} ranks on {plan.nodes} node{'s' * (plan.nodes > 1)}: with horovodrun")
    print(horovodrun(plan))
    print("\n# SLURM (add --partition and --account)", sbatch(plan), sep="\n")
    for controller, overlay in (("MPI Operator", mpijob), ("Kubeflow Trainer", trainjob)):
        print(f"\n# {controller}, as k8s/overlays/mine/kustomization.yaml: kubectl apply -k k8s/overlays/mine")
        print(overlay(plan))
    return 0


if __name__ == "__main__":
    need_readers()
    sys.exit(main())
