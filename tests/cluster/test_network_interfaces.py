"""NCCL_SOCKET_IFNAME on two hosts with unlike networks: a rank says so when it starts, before it loads TensorFlow."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.helpers import ROOT, namespaces

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(namespaces.missing() is not None, reason=str(namespaces.missing())),
]
FIRST, SECOND = (f"cnnopt{os.getpid()}-{name}" for name in ("first", "second"))
SERVE = "import time; from cnnopt.distributed import rendezvous as r; r.Rendezvous('10.0.0.1', 5000); time.sleep(300)"
#: The ranks have no GPU here, and without one NCCL is not used.
WITH_GPU = "from cnnopt.distributed import host, rendezvous; host.has_gpu = lambda *given: True; "
CHECK = "from cnnopt.distributed import rendezvous; rendezvous.check(gpu=True)"
TINY = ["--dataset=synthetic", "--depth=8", "--batch-size=64", "--epochs=1", "--name=none"]


@pytest.fixture(scope="module", autouse=True)
def hosts() -> Iterator[None]:
    """Two networks with an eth0 each, of which the first also has an ib0, and the rendezvous on the first."""
    server = None
    try:
        for name in (FIRST, SECOND):
            namespaces.ip("netns", "add", name)
            namespaces.ip("-n", name, "link", "set", "lo", "up")
        link = ["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", SECOND]
        namespaces.ip("-n", FIRST, *link)
        namespaces.ip("-n", FIRST, "link", "add", "ib0", "type", "veth", "peer", "name", "peer0")
        for number, name in enumerate((FIRST, SECOND), 1):
            namespaces.ip("-n", name, "address", "add", f"10.0.0.{number}/24", "dev", "eth0")
            namespaces.ip("-n", name, "link", "set", "eth0", "up")
        command = ["ip", "netns", "exec", FIRST, sys.executable, "-c", SERVE]
        server = subprocess.Popen(command, cwd=ROOT)
        yield
    finally:
        if server is not None:
            server.kill()
            server.wait()
        for name in (FIRST, SECOND):
            namespaces.ip("netns", "del", name, check=False)


def rank(host: str, number: int, interfaces: str, *command: str) -> subprocess.CompletedProcess[str]:
    """One of two ranks, each alone on its host."""
    variables = {
        "HOROVOD_RANK": str(number),
        "HOROVOD_SIZE": "2",
        "HOROVOD_LOCAL_RANK": "0",
        "HOROVOD_LOCAL_SIZE": "1",
        "HOROVOD_CROSS_RANK": str(number),
        "HOROVOD_CROSS_SIZE": "2",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "5000",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "NCCL_SOCKET_IFNAME": interfaces,
    }
    inside = ["ip", "netns", "exec", host, sys.executable, *command]
    return subprocess.run(
        inside, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("interfaces", ["ib0", "ib", "=ib0", "^eth,lo", "ib0,mlx5"])
def test_a_host_without_the_network_is_one_line(interfaces, tmp_path):
    program = f"{WITH_GPU}import train_hvd; train_hvd.entrypoint.start(train_hvd.main)"
    done = rank(SECOND, 1, interfaces, "-c", program, *TINY, f"--run-dir={tmp_path}")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"train_hvd.py: NCCL_SOCKET_IFNAME={interfaces}: ")
    assert "has no such network, but lo, eth0; give the beginning of a name" in line


@pytest.mark.parametrize("interfaces", ["", "ib0", "ib", "=ib0", "^eth,lo", "ib0,mlx5", "eth"])
def test_a_host_with_the_network_goes_on(interfaces):
    checked = rank(FIRST, 0, interfaces, "-c", CHECK)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_ranks_without_gpus_do_not_need_it():
    checked = rank(FIRST, 0, "ib9", "-c", "from cnnopt.distributed import rendezvous; rendezvous.check()")
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_whole_name_is_no_beginning():
    checked = rank(FIRST, 0, "=eth", "-c", CHECK)
    assert "RendezvousError: NCCL_SOCKET_IFNAME==eth: " in checked.stderr
