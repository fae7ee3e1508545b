"""The manifests as a cluster gets them: rendered by the real kustomize, and the pods that they describe."""

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


def kustomize() -> list[str]:
    """The command that renders a folder; skips the test where there is none."""
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
    # What kustomize deprecates, it says here.
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return list(yaml.safe_load_all(done.stdout))


class Manifests:
    """The documents of an overlay, by kind and name."""

    def __init__(self, overlay: str) -> None:
        self.overlay = overlay
        self.documents = copy.deepcopy(_rendered(overlay))

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
