"""The manifests as a cluster gets them, rendered by the real kustomize, and the pods that they describe."""

import copy
import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import ROOT

OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())
#: The overlay for Kubeflow Trainer. The others are for the MPI Operator.
TRAINJOB = "trainjob"


def kustomize() -> list[str]:
    """The command that renders a folder. Skips the test if no such command is installed."""
    for name, command in (("kubectl", ["kubectl", "kustomize"]), ("kustomize", ["kustomize", "build"])):
        if shutil.which(name):
            return command
    pytest.skip("neither kubectl nor kustomize is installed")


@functools.cache
def _rendered(overlay: str) -> list[dict[str, Any]]:
    folder = ROOT / "k8s" / ("base" if overlay == "base" else f"overlays/{overlay}")
    return render(folder)


def render(folder: Path) -> list[dict[str, Any]]:
    """All documents of a kustomization."""
    done = subprocess.run([*kustomize(), str(folder)], capture_output=True, text=True, check=False)
    # kustomize prints warnings of deprecated fields on standard error.
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return list(yaml.safe_load_all(done.stdout))


def render_plan(folder: Path, text: str) -> list[dict[str, Any]]:
    """All documents of an overlay that cnnopt.launch_plan has printed. ``folder`` also gets copies of the others."""
    shutil.copytree(ROOT / "k8s", folder)
    (folder / "overlays/mine").mkdir()
    (folder / "overlays/mine/kustomization.yaml").write_text(text)
    return render(folder / "overlays/mine")


class Manifests:
    """The documents of an overlay, by kind and name, and the things that the MPI Operator makes from its MPIJob."""

    def __init__(self, overlay: str, documents: list[dict[str, Any]] | None = None) -> None:
        self.overlay = overlay
        self.documents = copy.deepcopy(_rendered(overlay)) if documents is None else documents

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [document for document in self.documents if document["kind"] == kind]

    @property
    def job(self) -> dict[str, Any]:
        (job,) = self.of("MPIJob")
        return job

    def replica(self, role: str) -> dict[str, Any]:
        return self.job["spec"]["mpiReplicaSpecs"][role]

    def container(self, role: str) -> dict[str, Any]:
        (container,) = self.replica(role)["template"]["spec"]["containers"]
        return container

    @property
    def workers(self) -> int:
        return self.replica("Worker")["replicas"]

    @property
    def slots(self) -> int:
        return self.job["spec"]["slotsPerWorker"]

    @property
    def launcher(self) -> str:
        """The name of the launcher's pod."""
        return f"{self.name}-launcher"

    def worker(self, number: int) -> str:
        """The name of a worker's pod."""
        return f"{self.name}-worker-{number}"

    @property
    def name(self) -> str:
        return "cnnopt"

    @property
    def domain(self) -> str:
        """The part that follows a pod's name in the hostfile."""
        return f"{self.name}.default.svc"

    #: The mode of the job's private key. The mounted key belongs to root and to the group of fsGroup.
    key_mode = 0o644

    def hostfile(self) -> str:
        """The hostfile as the controller writes it."""
        return "".join(f"{self.worker(i)}.{self.domain} slots={self.slots}\n" for i in range(self.workers))

    def variables(self, role: str) -> dict[str, str]:
        """The environment of a container: variables of the manifest and of the controller."""
        added = {"K_MPI_JOB_ROLE": role.lower()}
        if role == "Launcher":
            added |= {
                "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
                "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
                "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
                "OMPI_MCA_orte_set_default_slots": str(self.slots),
                "NVIDIA_VISIBLE_DEVICES": "",
                "NVIDIA_DRIVER_CAPABILITIES": "",
            }
        return {**{v["name"]: v["value"] for v in self.container(role).get("env", [])}, **added}

    def pods(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The template of each kind of pod, with a name for messages."""
        for role in ("Launcher", "Worker"):
            yield role, self.replica(role)["template"]
        for kind in ("Deployment", "Job"):
            for document in self.of(kind):
                yield document["metadata"]["name"], document["spec"]["template"]

    def containers(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each container with the specification of its pod."""
        for _, template in self.pods():
            for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]:
                yield template["spec"], container


class TrainJob(Manifests):
    """The same for a TrainJob: the jobs that Kubeflow Trainer 2.3 makes from it and from its runtime.

    Source: pkg/runtime/core/trainingruntime.go (newRuntimeInfo), pkg/runtime/framework/plugins/mpi/mpi.go
    (EnforceMLPolicy, buildHostFileConfigMap), and plugins/jobset/{builder,jobset}.go (Trainer, SyncParallelCount).
    """

    key_mode = 0o640

    @property
    def job(self) -> dict[str, Any]:
        (job,) = self.of("TrainJob")
        return job

    @property
    def runtime(self) -> dict[str, Any]:
        (runtime,) = self.of("TrainingRuntime")
        return runtime

    @property
    def slots(self) -> int:
        mpi, trainer = self.runtime["spec"]["mlPolicy"]["mpi"], self.job["spec"]["trainer"]
        if "numProcPerNode" in trainer:
            return trainer["numProcPerNode"]
        limits = self.container("Worker")["resources"]["limits"]
        return max(mpi.get("numProcPerNode", 1), int(limits.get("nvidia.com/gpu", 1)))

    def replica(self, role: str) -> dict[str, Any]:
        """A job of the JobSet, in the shape of a replica of an MPIJob."""
        spec, trainer = self.runtime["spec"], self.job["spec"]["trainer"]
        name = {"Launcher": "launcher", "Worker": "node"}[role]
        (found,) = (job for job in spec["template"]["spec"]["replicatedJobs"] if job["name"] == name)
        job = copy.deepcopy(found["template"])
        labels = job.get("metadata", {}).get("labels", {})
        is_trainer = labels.get("trainer.kubeflow.org/trainjob-ancestor-step") == "trainer"
        count = spec["mlPolicy"].get("numNodes", 1) if is_trainer else job["spec"].get("parallelism", 1)
        assert not spec["mlPolicy"]["mpi"].get("runLauncherAsNode"), "not followed here"
        if name == "node":
            count = trainer.get("numNodes", count)
        pod = job["spec"]["template"]["spec"]
        volumes, mounts = [{"name": "mpi-ssh-auth", "secret": {"secretName": f"{self.name}-mpi-ssh-auth"}}], []
        mounts.append({"name": "mpi-ssh-auth", "mountPath": spec["mlPolicy"]["mpi"]["sshAuthMountPath"]})
        variables = {}
        if name == "launcher":
            volumes.append({"name": "mpi-hostfile", "configMap": {"name": f"{self.name}-mpi-hostfile"}})
            mounts.append({"name": "mpi-hostfile", "mountPath": "/etc/mpi"})
            variables = {
                "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
                "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
                "OMPI_MCA_orte_set_default_slots": str(self.slots),
                "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
            }
        pod["volumes"] += volumes
        for container in pod["containers"]:
            if container["name"] != "node":
                continue
            container["volumeMounts"] += mounts
            values = {v["name"]: v["value"] for v in container.get("env", [])} | variables
            if is_trainer:
                container |= {key: trainer[key] for key in ("image", "command", "args") if key in trainer}
                values |= {v["name"]: v["value"] for v in trainer.get("env", [])}
            container["env"] = [{"name": key, "value": value} for key, value in values.items()]
        # JobSet's own labels.
        template = job["spec"]["template"]
        template["metadata"]["labels"] |= {
            "jobset.sigs.k8s.io/jobset-name": self.name,
            "jobset.sigs.k8s.io/replicatedjob-name": name,
        }
        return {"replicas": count, "restartPolicy": pod["restartPolicy"], "template": template, "job": job["spec"]}

    @property
    def launcher(self) -> str:
        return f"{self.name}-launcher-0-0"

    def worker(self, number: int) -> str:
        return f"{self.name}-node-0-{number}"

    @property
    def domain(self) -> str:
        return self.name

    def variables(self, role: str) -> dict[str, str]:
        return {v["name"]: v["value"] for v in self.container(role)["env"]}


def of(overlay: str) -> Manifests:
    """The manifests of an overlay, in the class for the overlay's controller."""
    return TrainJob(overlay) if overlay == TRAINJOB else Manifests(overlay)
