"""A small cluster on one machine: pods as network, mount and process namespaces on one bridge.

A pod here has what the operator and the kubelet give it: the image's files and variables (from the Dockerfile), a
read-only root, the volumes of the manifest, a uid without privileges, the job's key, the hostfile, a name. It has no
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

#: Runs in the pod's own namespaces: "$1" is the folder of the layer, "$2" the pod's name, the rest the command, which
#: becomes process 1. For MOUNTS stand the mount commands of its volumes.
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
#: What the manifest's security context comes to.
USER = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--"]


@functools.cache
def missing() -> str | None:
    """Why this machine cannot act as a cluster; None if it can."""
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
    """What the stage ``runtime`` of the Dockerfile copies into the image, and its variables."""
    text = (ROOT / "docker/Dockerfile").read_text()
    stage = text.split(" AS runtime\n")[1].split("\nFROM ")[0]
    copied = [(source, target) for source, target in re.findall(r"^COPY (\S+) (\S+)$", stage, re.MULTILINE)]
    variables = shlex.split(" ".join(re.findall(r"^ENV (.*)$", stage, re.MULTILINE)))
    assert variables
    return copied, dict(word.split("=", 1) for word in variables)


class Pod:
    """One pod: a network namespace that stays, and what runs in it, again and again."""

    def __init__(self, cluster: "Cluster", name: str, address: str, key: Path) -> None:
        self.cluster, self.name, self.address, self.key = cluster, name, address, key
        self.network = f"{cluster.prefix}-{name}"
        self.log = cluster.folder / f"{name}.log"
        self.log.touch()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, pod: dict[str, Any], command: Sequence[str], environment: dict[str, str]) -> None:
        """Run ``command`` as the container of the manifest's ``pod`` would, as process 1."""
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
            # Where its interpreter says that it is.
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
                # The hostfile, which lies in the layer.
                assert target == "etc/mpi"
            else:
                bound[str(self.cluster.volume(volume["persistentVolumeClaim"]["claimName"]))] = target
        return lines + [f"mount --bind {shlex.quote(source)} {shlex.quote(to)}" for source, to in bound.items()]

    def kill(self) -> None:
        """End everything in the pod at once, as when its node is lost."""
        if self.process is not None and self.process.poll() is None:
            # Process 1, with which the kernel ends all others; unshare's own --kill-child does not outlast setpriv.
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
        """Send SIGTERM to process 1, as for a pod that is deleted."""
        self.first().send_signal(signal.SIGTERM)

    def execute(self, command: Sequence[str]) -> int:
        """Run a command beside process 1, as the kubelet runs hooks; returns its status."""
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
        """A command of this machine on the pod's network."""
        return ip("netns", "exec", self.network, *command, check=check)

    def accepts(self, caller: "Pod", port: int) -> bool:
        """Whether ``caller`` can open a connection: the kubelet's tcpSocket probe, or a foreign one."""
        probe = f"exec 3<>/dev/tcp/{self.address}/{port}"
        return caller.on_network("timeout", "3", "bash", "-c", probe, check=False).returncode == 0

    def limit(self, rate: str) -> None:
        """Hold what the pod sends to ``rate``, with 2 ms of delay where the kernel has netem."""
        self.on_network("tc", "qdisc", "del", "dev", "eth0", "root", check=False)
        shape = ["tbf", "rate", rate, "burst", "64kb", "latency", "200ms"]
        self.on_network("tc", "qdisc", "add", "dev", "eth0", "root", "handle", "1:", *shape)
        delay = ["parent", "1:1", "handle", "10:", "netem", "delay", "2ms"]
        self.on_network("tc", "qdisc", "add", "dev", "eth0", *delay, check=False)

    def sent(self) -> tuple[int, int]:
        """Bytes that went through the limit, and how often it held something back."""
        done = self.on_network("tc", "-s", "-j", "qdisc", "show", "dev", "eth0", "root")
        (shaped, *_) = json.loads(done.stdout)
        return shaped["bytes"], shaped["overlimits"]


class Cluster:
    """The pods of one MPIJob or TrainJob, those of strangers, and the bridge between them."""

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
        """The image's own files, to lie over those of this machine."""
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
        # The interpreter may live in a folder that only root may enter, the home of root for one.
        for prefix in (sys.prefix, sys.base_prefix):
            for parent in list(Path(prefix).resolve().parents)[:-1]:
                (layer / str(parent)[1:]).mkdir(parents=True, exist_ok=True)
        return layer

    def make_key(self, name: str) -> Path:
        """A key pair as the controller makes it, in a folder as the kubelet mounts it: root's and the group's."""
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
        """The folder that stands for a claim, writable for the pods' group."""
        folder = self.folder / claim
        if not folder.exists():
            folder.mkdir()
            os.chown(folder, 1000, 1000)
        return folder

    def add(self, name: str, *, key: Path | None = None) -> Pod:
        """A pod that is on the network, and runs nothing yet; nobody knows its name."""
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
        """Give the pod its names: its own host name, and that of the job's Service."""
        with self.hosts.open("a") as hosts:
            hosts.write(f"{pod.address} {pod.name}.{self.manifests.domain} {pod.name}\n")

    def start_worker(self, pod: Pod) -> None:
        """sshd, as the manifest starts it; returns when the readiness probe succeeds."""
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
        """The manifest's launcher with more flags and variables, under what the image and the operator set."""
        container = self.manifests.container("Launcher")
        environment = {**self.environment, **self.manifests.variables("Launcher"), **variables}
        template = self.manifests.replica("Launcher")["template"]["spec"]
        self.launcher.start(template, [*container["command"], *container["args"], *arguments], environment)

    def logs(self) -> str:
        """What all pods have said."""
        return "\n".join(f"---- {pod.name}\n{pod.log.read_text(errors='replace')}" for pod in self.pods.values())

    def end(self) -> None:
        """Nothing of it is left: neither processes, nor namespaces; mounts go with them."""
        for pod in self.pods.values():
            pod.kill()
            ip("netns", "del", pod.network, check=False)
        ip("netns", "del", self.switch, check=False)


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """iproute2's command."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done
