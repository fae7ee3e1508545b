"""A small cluster on one machine: pods are network, mount and process namespaces on one bridge.

A pod gets the same as from the operator and the kubelet: the image's files and variables (from the Dockerfile), a
read-only root, the manifest's volumes, a uid without privileges, the job's key, the hostfile and a name. A pod has no
seccomp and no memory or CPU limits. Names come from a hosts file, because there is no DNS.
"""

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.helpers import ROOT
from tests.helpers.manifests import Manifests

#: Runs in the pod's namespaces. "$1" is the folder of the layer, "$2" is the pod's name, and the rest is the command,
#: which becomes process 1. The mount commands of the pod's volumes replace MOUNTS.
CONTAINER = """
hostname "$2"
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/layer /mnt/root
cp -a "$1/." /mnt/layer
mount -t overlay overlay -o lowerdir=/mnt/layer:/ /mnt/root
cd /mnt/root
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
MOUNTS
shift 2
exec chroot /mnt/root "$@"
"""
#: The command that has the effect of the manifest's security context.
USER = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--"]


@functools.cache
def missing() -> str | None:
    """The reason why this machine cannot act as a cluster, or None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    needed = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "nft": "nftables", "pkill": "procps"}
    for tool, package in needed.items():
        if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"{tool} is not installed: apt-get install {package}"
    probe = """
        ip link set lo up && mount -t tmpfs tmpfs /mnt && mkdir /mnt/layer /mnt/root &&
        mount -t overlay overlay -o lowerdir=/mnt/layer:/ /mnt/root && nft list ruleset &&
        tc qdisc add dev lo root tbf rate 1gbit burst 64kb latency 200ms"""
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--propagation", "private", "sh", "-c", probe],
        capture_output=True,
        text=True,
    )
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else None


def image() -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The files that the Dockerfile's stage ``runtime`` copies into the image, and the variables of that stage."""
    text = (ROOT / "docker/Dockerfile").read_text()
    stage = text.split(" AS runtime\n")[1].split("\nFROM ")[0]
    copied = [(source, target) for source, target in re.findall(r"^COPY (\S+) (\S+)$", stage, re.MULTILINE)]
    variables = shlex.split(" ".join(re.findall(r"^ENV (.*)$", stage, re.MULTILINE)))
    assert variables
    return copied, dict(word.split("=", 1) for word in variables)


class Pod:
    """One pod: a network namespace that stays, and a container in it that can start again and again."""

    def __init__(self, cluster: "Cluster", name: str, address: str, key: Path) -> None:
        self.cluster, self.name, self.address, self.key = cluster, name, address, key
        self.network = f"{cluster.prefix}-{name}"
        self.log = cluster.folder / f"{name}.log"
        self.log.touch()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, pod: dict[str, Any], command: Sequence[str], environment: dict[str, str]) -> None:
        """Run ``command`` as process 1, as the container of the manifest's ``pod`` would."""
        assert self.process is None or self.process.poll() is not None
        variables = [f"{name}={value}" for name, value in environment.items()]
        script = "set -eu\n" + CONTAINER.replace("MOUNTS", "\n".join(self.mounts(pod)))
        with self.log.open("ab") as log:
            apart = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--propagation=private"]
            run = ["bash", "-c", script, "container", str(self.cluster.layer), self.name]
            inside = [*USER, "env", "-i", "--chdir=/opt/cnnopt", *variables, *command]
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.network, *apart, *run, *inside],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def mounts(self, pod: dict[str, Any]) -> list[str]:
        bound = {
            str(self.cluster.hosts): "etc/hosts",
            str(self.key): "home/mpiuser/.ssh",
            sys.prefix: "opt/venv",
            # The interpreter of the virtual environment says that it is in this folder.
            sys.base_prefix: sys.base_prefix[1:],
        }
        lines = []
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in pod["containers"][0]["volumeMounts"]:
            volume, target = volumes[mount["name"]], mount["mountPath"][1:]
            if "emptyDir" in volume:
                size = volume["emptyDir"]["sizeLimit"].removesuffix("i")
                lines.append(f"mount -t tmpfs -o mode=1777,size={size} tmpfs {target}")
            elif "secret" in volume:
                assert bound[str(self.key)] == target
            elif "configMap" in volume:
                # The hostfile, which is already in the layer.
                assert target == "etc/mpi"
            else:
                bound[str(self.cluster.volume(volume["persistentVolumeClaim"]["claimName"]))] = target
        return lines + [f"mount --bind {shlex.quote(source)} {shlex.quote(to)}" for source, to in bound.items()]

    def kill(self) -> None:
        """End everything in the pod at once, as if its node were lost."""
        if self.process is not None and self.process.poll() is None:
            # Kill process 1: the kernel then ends all others. unshare's --kill-child has no effect after setpriv.
            for first in psutil.Process(self.process.pid).children():
                first.kill()
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)

    def first(self) -> psutil.Process:
        """Process 1 of the pod."""
        assert self.process is not None
        (first,) = psutil.Process(self.process.pid).children()
        return first

    def terminate(self) -> None:
        """Send SIGTERM to process 1, as when a pod is deleted."""
        self.first().send_signal(signal.SIGTERM)

    def execute(self, command: Sequence[str]) -> int:
        """Run a command beside process 1, as the kubelet runs hooks. Returns the command's status."""
        enter = ["nsenter", "--target", str(self.first().pid), "--pid", "--mount", "--root", "--net"]
        return subprocess.run([*enter, *USER, *command], timeout=120).returncode

    def wait(self, timeout: float) -> int:
        assert self.process is not None
        return self.process.wait(timeout)

    def wait_for(self, text: str, timeout: float, since: int = 0) -> None:
        """Return once the log holds ``text`` after its first ``since`` characters."""
        end = time.monotonic() + timeout
        while text not in self.log.read_text(errors="replace")[since:]:
            assert time.monotonic() < end, f"no '{text}' in: {self.cluster.logs()}"
            assert self.process is None or self.process.poll() is None, self.cluster.logs()
            time.sleep(0.2)

    def on_network(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of this machine on the pod's network."""
        return ip("netns", "exec", self.network, *command, check=check)

    def accepts(self, caller: "Pod", port: int) -> bool:
        """Whether ``caller`` can open a connection, as the kubelet's tcpSocket probe or as a stranger."""
        probe = f"exec 3<>/dev/tcp/{self.address}/{port}"
        return caller.on_network("timeout", "3", "bash", "-c", probe, check=False).returncode == 0

    def limit(self, rate: str) -> None:
        """Limit the pod's sending to ``rate``, with 2 ms of delay if the kernel has netem."""
        self.on_network("tc", "qdisc", "del", "dev", "eth0", "root", check=False)
        shape = ["tbf", "rate", rate, "burst", "64kb", "latency", "200ms"]
        self.on_network("tc", "qdisc", "add", "dev", "eth0", "root", "handle", "1:", *shape)
        delay = ["parent", "1:1", "handle", "10:", "netem", "delay", "2ms"]
        self.on_network("tc", "qdisc", "add", "dev", "eth0", *delay, check=False)

    def sent(self) -> tuple[int, int]:
        """Bytes that went through the limit, and the number of times that the limit held something back."""
        done = self.on_network("tc", "-s", "-j", "qdisc", "show", "dev", "eth0", "root")
        (shaped, *_) = json.loads(done.stdout)
        return shaped["bytes"], shaped["overlimits"]


class Cluster:
    """The pods of one MPIJob or TrainJob, the pods of strangers, and the bridge between them."""

    def __init__(self, folder: Path, manifests: Manifests) -> None:
        self.folder, self.manifests = folder, manifests
        self.prefix = f"cnnopt{os.getpid()}"
        self.pods: dict[str, Pod] = {}
        folder.chmod(0o755)
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        copied, self.environment = image()
        self.environment["HOME"] = "/home/mpiuser"
        self.layer = self._layer(copied)
        self.switch = f"{self.prefix}-switch"
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        self.key = self.make_key("job")
        self.launcher = self.add(manifests.launcher)
        self.workers = [self.add(manifests.worker(i)) for i in range(manifests.workers)]

    def _layer(self, copied: list[tuple[str, str]]) -> Path:
        """A folder with the image's files, which will cover those of this machine."""
        layer = self.folder / "layer"
        for name in ("data", "runs", "opt/venv", "etc/mpi", "home/mpiuser/.ssh"):
            (layer / name).mkdir(parents=True)
        for source, target in copied:
            to = layer / target.strip("/")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to)
            else:
                to = to / Path(source).name if target.endswith("/") else to
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, to)
        for name, line in (("passwd", "mpiuser:x:1000:1000::/home/mpiuser:/bin/bash"), ("group", "mpiuser:x:1000:")):
            kept = [other for other in Path("/etc", name).read_text().splitlines() if ":1000:" not in other]
            (layer / "etc" / name).write_text("\n".join([*kept, line]) + "\n")
        (layer / "etc/mpi/hostfile").write_text(self.manifests.hostfile())
        # The interpreter may be below a folder that only root may enter, such as the home of root.
        for prefix in (sys.prefix, sys.base_prefix):
            for parent in list(Path(prefix).resolve().parents)[:-1]:
                (layer / str(parent)[1:]).mkdir(parents=True, exist_ok=True)
        return layer

    def make_key(self, name: str) -> Path:
        """A key pair as the controller makes it, in a folder as the kubelet mounts it: owned by root and the group."""
        folder = self.folder / f"key-{name}"
        folder.mkdir()
        private = folder / "id_rsa"
        command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-f", str(private)]
        subprocess.run(command, check=True)
        shutil.copy(folder / "id_rsa.pub", folder / "authorized_keys")
        for file in folder.iterdir():
            file.chmod(self.manifests.key_mode if file == private else 0o644)
            os.chown(file, 0, 1000)
        return folder

    def volume(self, claim: str) -> Path:
        """The folder that represents a claim. The pods' group can write to it."""
        folder = self.folder / claim
        if not folder.exists():
            folder.mkdir()
            os.chown(folder, 1000, 1000)
        return folder

    def add(self, name: str, *, key: Path | None = None) -> Pod:
        """A pod that is on the network and runs nothing yet. The other pods do not know its name yet."""
        pod = Pod(self, name, f"10.0.0.{len(self.pods) + 1}", key or self.key)
        self.pods[name] = pod
        port = f"port{len(self.pods)}"
        ip("netns", "add", pod.network)
        ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", pod.network)
        ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
        ip("-n", pod.network, "address", "add", f"{pod.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", pod.network, "link", "set", device, "up")
        return pod

    def publish(self, pod: Pod) -> None:
        """Add the pod's names to the hosts file: its host name, and its name under the job's Service."""
        with self.hosts.open("a") as hosts:
            hosts.write(f"{pod.address} {pod.name}.{self.manifests.domain} {pod.name}\n")

    def start_worker(self, pod: Pod) -> None:
        """Start sshd as the manifest does. Returns when the readiness probe succeeds."""
        container = self.manifests.container("Worker")
        (ssh,) = container["ports"]
        template = self.manifests.replica("Worker")["template"]["spec"]
        pod.start(template, container["command"], {**self.environment, **self.manifests.variables("Worker")})
        if pod.address not in self.hosts.read_text():
            self.publish(pod)
        end = time.monotonic() + 30
        while not pod.accepts(self.launcher, ssh["containerPort"]):
            assert time.monotonic() < end, self.logs()
            time.sleep(0.2)

    def start_launcher(self, arguments: Sequence[str], variables: dict[str, str]) -> None:
        """Start the manifest's launcher with more flags and variables. ``variables`` override all others."""
        container = self.manifests.container("Launcher")
        environment = {**self.environment, **self.manifests.variables("Launcher"), **variables}
        template = self.manifests.replica("Launcher")["template"]["spec"]
        self.launcher.start(template, [*container["command"], *container["args"], *arguments], environment)

    def logs(self) -> str:
        """The logs of all pods."""
        return "\n".join(f"---- {pod.name}\n{pod.log.read_text(errors='replace')}" for pod in self.pods.values())

    def end(self) -> None:
        """Remove all processes and namespaces. The mounts disappear with the namespaces."""
        for pod in self.pods.values():
            pod.kill()
            ip("netns", "del", pod.network, check=False)
        ip("netns", "del", self.switch, check=False)


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the ``ip`` command of iproute2."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done
