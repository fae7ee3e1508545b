"""Places of ranks under SLURM, their rendezvous, and cnnopt.launch, which serves it."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
from hypothesis import given
from hypothesis import strategies as st

from cnnopt.distributed import rendezvous, slurm
from cnnopt.distributed.rendezvous import Rendezvous, RendezvousError
from cnnopt.errors import UserError
from tests.helpers import ROOT

# What srun says ------------------------------------------------------------------------------------------------


def as_slurm_writes(counts: list[int]) -> str:
    groups = [(count, len(list(group))) for count, group in itertools.groupby(counts)]
    return ",".join(f"{count}(x{times})" if times > 1 else f"{count}" for count, times in groups)


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2,1(x2)", [1, 2, 1, 1]), ("128(x2)", [128, 128])]
)
def test_tasks_per_node(text, counts):
    assert slurm.tasks_per_node(text) == counts
    assert as_slurm_writes(counts) == text


@pytest.mark.parametrize("text", ["", "2x3", "2(x3", "2,,1", "-1", "2(3)"])
def test_what_srun_does_not_write_is_refused(text):
    with pytest.raises(ValueError, match=r"SLURM_STEP_TASKS_PER_NODE=.*: expected counts such as 2\(x3\),1"):
        slurm.tasks_per_node(text)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_every_task_gets_the_place_that_horovod_itself_would_assign(counts):
    names = [f"n{node}" for node in range(len(counts))]
    slots = get_host_assignments([HostInfo(name, count) for name, count in zip(names, counts, strict=True)], 1)
    for slot in slots:
        said = {
            "SLURM_PROCID": str(slot.rank),
            "SLURM_STEP_NUM_TASKS": str(slot.size),
            "SLURM_STEP_TASKS_PER_NODE": as_slurm_writes(counts),
            "SLURM_NODEID": str(names.index(slot.hostname)),
            "SLURM_LOCALID": str(slot.local_rank),
            "SLURMD_NODENAME": slot.hostname,
        }
        assert slurm.horovod_variables(said) == {
            f"HOROVOD_{name.upper()}": str(value) for name, value in vars(slot).items()
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_NODEID": None}, "SLURM_NODEID is not set"),
        ({"SLURM_LOCALID": ""}, "SLURM_LOCALID=: no number"),
        ({"SLURMD_NODENAME": None}, "SLURMD_NODENAME is not set"),
        ({"SLURM_NODEID": "2"}, "does not fit SLURM_NODEID=2, SLURM_LOCALID=0 and SLURM_STEP_NUM_TASKS=3"),
        ({"SLURM_LOCALID": "1"}, "does not fit SLURM_NODEID=1, SLURM_LOCALID=1"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "does not fit .* SLURM_STEP_NUM_TASKS=4"),
    ],
)
def test_what_srun_has_said_in_part_is_refused(changes, message):
    whole = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1",
             "SLURM_NODEID": "1", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "b"}  # fmt: skip
    assert slurm.horovod_variables(whole)["HOROVOD_LOCAL_SIZE"] == "1"
    with pytest.raises(ValueError, match=message):
        slurm.horovod_variables({k: v for k, v in {**whole, **changes}.items() if v is not None})


def test_a_batch_script_is_no_task():
    assert slurm.horovod_variables({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"}) == {}


# The rendezvous ------------------------------------------------------------------------------------------------


def ask(server: Rendezvous, method: str, path: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", body, method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read()


def test_a_key_is_missing_until_put_and_stays_when_its_rank_is_done():
    with Rendezvous("127.0.0.1") as server:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(server, "GET", "/global/0")
        ask(server, "PUT", "/global/0", b"\0address")
        assert ask(server, "GET", "/global/0") == b"\0address"
        ask(server, "DELETE", "/global/0")
        assert ask(server, "GET", "/global/0") == b"\0address"
        server.shutdown()


def test_two_jobs_on_one_node_and_a_port_in_use():
    with Rendezvous("127.0.0.1") as one, Rendezvous("127.0.0.1") as two:
        ask(one, "PUT", "/global/0", b"one")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(two, "GET", "/global/0")
        with pytest.raises(UserError, match=rf"127.0.0.1 port {one.server_port}: .* leave --port out"):
            Rendezvous("127.0.0.1", one.server_port)
        one.shutdown()
        two.shutdown()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_of_the_host_gets_no_answer():
    code = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=20)"
    with Rendezvous("127.0.0.1") as server:
        ask(server, "PUT", "/global/0", b"address")
        url = f"http://127.0.0.1:{server.server_port}/global/0"
        # The system's own Python: another user may not read this one's folder.
        command = ["/usr/bin/python3", "-c", code, url]
        assert subprocess.run(command, cwd="/").returncode == 0
        other = subprocess.run(command, cwd="/", user=65534, capture_output=True, text=True)
        assert "without response" in other.stderr or "reset" in other.stderr, other
        server.shutdown()


def test_the_address_of_an_interface():
    assert rendezvous.address_of("lo") == "127.0.0.1"
    with pytest.raises(UserError, match=r"--interface none0: has no IPv4 address here; there are .*lo"):
        rendezvous.address_of("none0")


def two_hosts(address: str, port: int) -> dict[str, str]:
    place = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_SIZE": "1"}
    return {**place, "HOROVOD_GLOO_RENDEZVOUS_ADDR": address, "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port)}


def test_a_rank_that_reaches_nothing_says_so_and_what_to_do():
    with Rendezvous("127.0.0.1") as server:
        rendezvous.check(two_hosts("127.0.0.1", server.server_port))
        server.shutdown()
    with pytest.raises(RendezvousError, match=r"rank 1 on .* cannot reach .*in /etc/hosts there, give its name"):
        rendezvous.check(two_hosts("127.0.0.1", server.server_port), patience=0)


def of_one_host(address: str, port: object) -> dict[str, str]:
    return {**two_hosts(address, 0), "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port), "HOROVOD_LOCAL_SIZE": "2"}


def test_what_another_job_has_left_is_refused_at_once():
    with Rendezvous("127.0.0.1") as server:
        there = of_one_host("127.0.0.1", server.server_port)
        rendezvous.check(there)
        assert rendezvous.answers(there)
        server.shutdown()
    left = [(there, "Connection refused"), (of_one_host("127.0.0.1", "x"), "InvalidURL")]
    for variables, why in left:
        with pytest.raises(RendezvousError, match=rf"^HOROVOD_SIZE=2, but no launcher answers at 127.* \(.*{why}"):
            rendezvous.check(variables, patience=0)
        assert not rendezvous.answers(variables)
    with pytest.raises(RendezvousError, match="HOROVOD_SIZE=2, but HOROVOD_GLOO_RENDEZVOUS_ADDR is not set"):
        rendezvous.check({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"})
    # mpirun's ranks know of no rendezvous.
    rendezvous.check({"OMPI_COMM_WORLD_SIZE": "2"})


@pytest.mark.parametrize("name", ["nosuch.invalid", "a" * 64 + ".b"])
def test_a_host_whose_name_has_no_address_is_one_line(name, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    with Rendezvous("127.0.0.1") as server:
        with pytest.raises(UserError, match=rf"this host's name {name} has no address here.*add it to /etc/hosts"):
            rendezvous.check(of_one_host("127.0.0.1", server.server_port))
        server.shutdown()


def test_a_host_whose_own_name_is_the_loopback_is_named(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    rendezvous.check_own_name("127.0.0.1")
    with pytest.raises(RendezvousError, match=r"name of this host, localhost, resolves to 127.0.0.1.*in /etc/hosts"):
        rendezvous.check_own_name("10.0.0.1")


# cnnopt.launch -------------------------------------------------------------------------------------------------


def launch(*arguments: str, **variables: str) -> subprocess.Popen:
    code = "import sys; from cnnopt import launch; launch.GRACE = 0.3; sys.exit(launch.main(sys.argv[1:]))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HOROVOD_"))}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**clean, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def rank(code: str) -> list[str]:
    return ["--", sys.executable, "-c", f"import os, signal, sys, time; rank = int(os.environ['HOROVOD_RANK']); {code}"]


def test_all_ranks_are_started_and_succeed():
    process = launch(
        "-np", "3", *rank("os.write(1, (str(rank) + ' of ' + os.environ['HOROVOD_SIZE'] + chr(10)).encode())")
    )
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert sorted(stdout.splitlines()) == ["0 of 3", "1 of 3", "2 of 3"]


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(3)", 3, "rank 1 ended with status 3"),
        ("os.kill(os.getpid(), 9)", 137, "rank 1 was killed by SIGKILL"),
    ],
)
def test_a_rank_that_fails_is_named_and_ends_the_others(end, status, said):
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
    process = launch("-np", "2", *rank(f"exec('{end}' if rank else '{stubborn}')"))
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (status, f"cnnopt.launch: {said}\n")


def test_a_signal_reaches_the_ranks_and_their_status_comes_back():
    told = (
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); os.write(1, b'ready' + bytes([10])); time.sleep(300)"
    )
    process = launch("-np", "2", *rank(told))
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


#: What training does: it saves when told, unless it is told again.
SAVES = (
    "from cnnopt.distributed.signals import StopRequest; request = StopRequest(); request.training = True; "
    "request.listen(); os.write(1, b'ready' + bytes([10])); "
    "[time.sleep(0.05) for _ in iter(lambda: request.told, True)]; time.sleep({seconds}); sys.exit(request.status)"
)


@pytest.mark.parametrize("to_all", [True, False], ids=["a terminal's", "of a script to the launcher"])
def test_the_first_ctrl_c_stops_all_ranks_with_130(to_all):
    process = launch("-np", "2", *rank(SAVES.format(seconds=2)))
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    began = time.monotonic()
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    # They had the time to save.
    assert time.monotonic() - began > 2
    assert stderr.count("\n") == 1
    assert f"ended with status {130 if to_all else 75}" in stderr


@pytest.mark.parametrize("to_all", [True, False], ids=["a terminal's", "of a script to the launcher"])
def test_the_second_ctrl_c_ends_all_ranks_at_once(to_all):
    process = launch("-np", "2", *rank(SAVES.format(seconds=300)))
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    for _ in range(2):
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        time.sleep(2)
    process.communicate(timeout=20)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "ls"], "-np is missing: outside a SLURM job, say how many ranks to start"),
        (["-np", "0", "--", "ls"], "-np 0: must be at least 1"),
        (["-np", "1", "--", "no-such-program"], "no-such-program: cannot be started: No such file or directory"),
        (["-np", "1", "--port", "70000", "--", "ls"], "--port 70000: must be below 65536"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    process = launch(*arguments)
    assert process.communicate(timeout=60) == ("", f"cnnopt.launch: {message}\n")
    assert process.returncode == 2
