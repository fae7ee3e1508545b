"""A run whose hosts change: a stopped rank is dropped, a host comes back, and the global batch stays the same."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.helpers import ssh_host

pytestmark = pytest.mark.timeout(1500)
RUN = [
    *("--dataset", "synthetic", "--depth", "8", "--batch-size", "66", "--precision", "float32", "--save-every", "10s"),
    *("--epochs", "96", "--warmup", "1e", "--name", "run"),
]


def test_a_run_goes_on_with_fewer_and_with_more_ranks_and_the_same_batch(start, tmp_path, monkeypatch):
    hosts, script = tmp_path / "hosts", tmp_path / "hosts.sh"
    hosts.write_text("localhost:2\n")
    script.write_text(f"#!/bin/sh\ncat {hosts}\n")
    script.chmod(0o755)
    monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", "30")
    job = start(
        0, "-m", "cnnopt.elastic", "--max-np", "5", "--host-discovery-script", str(script),
        *RUN, "--run-dir", str(tmp_path), launcher=(),
    )  # fmt: skip
    # Two epochs have 16 steps, so one checkpoint is there.
    job.wait_for("epoch   2/96")
    stopped = job.ranks()[1]
    stopped.send_signal(signal.SIGSTOP)
    # horovodrun kills it, once the other rank has noticed and said so.
    job.wait_for(f"rank 1 (host localhost, pid {stopped.pid}): killed, stopped")
    hosts.write_text("localhost:1\n")
    job.wait_for("1 ranks on localhost:1, after step ")
    job.wait_for("[0]<stdout>:resumed after step ")
    resumed = job.output().index("1 ranks on")
    job.wait_until(lambda output: "/96 loss" in output[resumed:])
    # Of four slots the batch of 66 leaves one unused.
    hosts.write_text("localhost:4\n")
    job.wait_for("3 ranks on localhost:3, after step ")
    assert job.wait() == 0, job.output()
    assert not stopped.is_running()

    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 97))
    # The same batch at any number of ranks: as many steps as 512 images take in batches of 66.
    assert [line["step"] for line in lines] == [-(-epoch * 512 // 66) for epoch in range(1, 97)]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["test_accuracy"] > 0.9
    assert result["sparsity"] == pytest.approx(0.6, abs=1e-4)


@pytest.fixture
def other_host(tmp_path_factory):
    if reason := ssh_host.missing():
        pytest.skip(reason)
    made = ssh_host.SshHost(tmp_path_factory.mktemp("ssh"))
    yield made
    made.end()


def test_ranks_of_another_host_save_and_end_too(start, tmp_path, monkeypatch, other_host):
    # No rank runs beside the supervisor. horovodrun ends its ssh clients, and nothing tells the ranks.
    for name, value in other_host.environment.items():
        monkeypatch.setenv(name, value)
    hosts, script = tmp_path / "hosts", tmp_path / "hosts.sh"
    hosts.write_text(f"{ssh_host.NAME}:1\n")
    script.write_text(f"#!/bin/sh\ncat {hosts}\n")
    script.chmod(0o755)
    arguments = ["-m", "cnnopt.elastic", "--max-np", "2", "--host-discovery-script", str(script)]
    job = start(0, *arguments, *RUN, "--run-dir", str(tmp_path), launcher=())
    job.wait_for("epoch   2/96")
    (rank,) = training(tmp_path)
    # Another slot comes: the rank saves, and two go on.
    hosts.write_text(f"{ssh_host.NAME}:2\n")
    job.wait_for("2 ranks on 127.0.0.2:2, after step ")
    assert not psutil.pid_exists(rank)
    job.wait_for("[0]<stdout>:resumed after step ")
    resumed = job.output().index("2 ranks on")
    job.wait_until(lambda output: "/96 loss" in output[resumed:])
    job.process.terminate()
    assert job.wait(100) == 75, job.output()
    assert training(tmp_path) == []
    assert job.output().count("stopped by a signal, and saved") == 2
    assert not (tmp_path / "run/result.json").exists()


def training(folder: Path) -> list[int]:
    """The processes that train in this folder, on either host."""
    commands = {p.pid: p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])}
    # The launcher and its shells have the same words, but in another place.
    return [pid for pid, command in commands.items() if command[1:2] == ["-X"] and str(folder) in command]
