"""The Kubernetes job acted out: the commands of the rendered manifest, over ssh between namespaces."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cnnopt import launch_plan
from cnnopt.run import checkpoint
from tests.helpers import namespaces
from tests.helpers.jobs import assert_pruned
from tests.helpers.manifests import Manifests, TrainJob, render_plan

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(namespaces.missing() is not None, reason=str(namespaces.missing())),
]
TINY = ["--dataset=synthetic", "--depth=8", "--batch-size=64", "--precision=float32", "--name=run"]
#: Two ranks share this machine.
VARIABLES = {"TF_NUM_INTRAOP_THREADS": "1", "LAUNCH_PATIENCE": "60"}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[namespaces.Cluster]:
    made = namespaces.Cluster(tmp_path, Manifests("cpu"))
    yield made
    made.end()


def metrics(cluster: namespaces.Cluster) -> list[dict]:
    return [json.loads(line) for line in (cluster.volume("cnnopt-runs") / "run/metrics.jsonl").read_text().splitlines()]


def newest(cluster: namespaces.Cluster) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint.list_steps(cluster.volume("cnnopt-runs") / "run/checkpoints")[-1])


def test_it_trains_over_the_workers_although_one_is_late(cluster):
    first, late = cluster.workers
    for pod in cluster.pods.values():
        pod.limit("1gbit")
    cluster.publish(cluster.launcher)
    cluster.start_worker(first)
    begun = time.monotonic()
    cluster.start_launcher([*TINY, "--epochs=12"], VARIABLES)
    # It has no name and no sshd for 20 seconds.
    timer = threading.Timer(20, cluster.start_worker, [late])
    timer.start()
    status = cluster.launcher.wait(500)
    timer.join()
    log = cluster.launcher.log.read_text()
    assert status == 0, cluster.logs()
    assert time.monotonic() - begun > 20
    assert "launch.sh: 2 ranks on 2 of 2 workers" in log
    # One rank on each worker, none on the launcher.
    environment = json.loads((cluster.volume("cnnopt-runs") / "run/env.json").read_text())
    assert environment["ranks"] == 2
    assert environment["host"].startswith("cnnopt-worker-0")
    assert [line["epoch"] for line in metrics(cluster)] == list(range(1, 13))
    final = newest(cluster)
    assert_pruned(final.arrays, 0.6)
    # Each worker has sent its gradients: 75,000 weights in float32, 8 steps an epoch, over the limited link.
    assert all(worker.sent()[0] > 96 * 75_000 * 4 // 2 for worker in cluster.workers)


def test_a_trainjob_trains_over_its_nodes(tmp_path):
    # Two nodes without GPUs. The plan's flags come first, so those of the test win.
    plan, _ = launch_plan.parse_plan(["--nodes", "2", "--cpus-per-rank", "1", "--", *TINY])
    manifests = TrainJob("plan", render_plan(tmp_path / "k8s", launch_plan.trainjob(plan)))
    acted = namespaces.Cluster(tmp_path, manifests)
    try:
        launcher, nodes = acted.launcher, acted.workers
        acted.publish(launcher)
        # The launcher depends on them: JobSet makes it once they are ready.
        for node in nodes:
            acted.start_worker(node)
        acted.start_launcher(["--epochs=2"], {})
        assert launcher.wait(500) == 0, acted.logs()
        assert "launch.sh: 2 ranks on 2 of 2 workers" in launcher.log.read_text()
        environment = json.loads((acted.volume("cnnopt-runs") / "run/env.json").read_text())
        assert environment["ranks"] == 2
        assert environment["host"].startswith("cnnopt-node-0-0")
        assert [line["epoch"] for line in metrics(acted)] == [1, 2]
        assert_pruned(newest(acted).arrays, 0.6)
    finally:
        acted.end()


def test_failures_and_stops_are_retried_and_go_on(cluster):
    flags = [*TINY, "--epochs=160"]
    launcher, (kept, lost) = cluster.launcher, cluster.workers
    for pod in cluster.pods.values():
        pod.limit("100mbit")
    cluster.publish(launcher)
    cluster.start_worker(kept)
    cluster.start_worker(lost)

    # A node is lost.
    cluster.start_launcher(flags, VARIABLES)
    launcher.wait_for("epoch   3/160", 400)
    lost.kill()
    assert launcher.wait(120) != 0
    assert lost.sent()[1] > 0

    # The kubelet has started sshd again, the Job a new launcher. Then a worker is deleted, which first runs its hook.
    cluster.start_worker(lost)
    said = len(launcher.log.read_text())
    cluster.start_launcher(flags, VARIABLES)
    launcher.wait_for("resumed after step", 400, since=said)
    launcher.wait_for("epoch   6/160", 400, since=said)
    assert lost.execute(cluster.manifests.container("Worker")["lifecycle"]["preStop"]["exec"]["command"]) == 0
    lost.kill()
    assert launcher.wait(120) != 0
    assert "stopped by a signal, and saved" in launcher.log.read_text()[said:]
    stopped = newest(cluster).step

    # It is gone for good: as the elastic overlay has it, the other one will do. Then the launcher is deleted.
    assert "LAUNCH_AT_LEAST" in {v["name"] for v in Manifests("elastic").container("Launcher")["env"]}
    said = len(launcher.log.read_text())
    cluster.start_launcher(flags, {**VARIABLES, "LAUNCH_AT_LEAST": "1", "LAUNCH_PATIENCE": "5"})
    launcher.wait_for("launch.sh: 1 ranks on 1 of 2 workers", 60, since=said)
    launcher.wait_for(f"resumed after step {stopped}", 400, since=said)
    launcher.wait_for("epoch   9/160", 400, since=said)
    launcher.terminate()
    assert launcher.wait(120) != 0
    assert "stopped by a signal, and saved" in launcher.log.read_text()[said:]
    epochs = [line["epoch"] for line in metrics(cluster)]
    assert epochs == list(range(1, len(epochs) + 1))
    assert 9 <= len(epochs) < 160

    # Deleted while horovodrun still starts: there is no rank yet to be told, and none comes.
    said = len(launcher.log.read_text())
    cluster.start_launcher(flags, {**VARIABLES, "LAUNCH_AT_LEAST": "1", "LAUNCH_PATIENCE": "5"})
    launcher.wait_for("launch.sh: 1 ranks on 1 of 2 workers", 60, since=said)
    launcher.terminate()
    assert launcher.wait(60) != 0
    assert "resumed after step" not in launcher.log.read_text()[said:]


def test_strangers_are_refused(cluster):
    worker, _ = cluster.workers
    cluster.start_worker(worker)
    stranger = cluster.add("stranger", key=cluster.make_key("stranger"))
    (ssh,) = cluster.manifests.container("Worker")["ports"]
    template = cluster.manifests.replica("Launcher")["template"]["spec"]

    def log_in(pod: namespaces.Pod) -> int:
        pod.start(template, ["ssh", "-n", worker.name, "true"], cluster.environment)
        return pod.wait(60)

    # Another job's key opens nothing, whatever the network allows.
    assert log_in(cluster.launcher) == 0, cluster.logs()
    assert log_in(stranger) == 255
    assert "Permission denied (publickey)" in stranger.log.read_text()
    # The NetworkPolicy, as a cluster's network plugin would enforce it on the worker: from the job's pods only.
    (policy,) = (p for p in cluster.manifests.of("NetworkPolicy") if p["metadata"]["name"] == "cnnopt-training")
    (rule,) = policy["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
    (ports,) = rule["ports"]
    ours = ", ".join(pod.address for pod in (cluster.launcher, *cluster.workers))
    rules = f"""
        table inet admission {{
            chain ingress {{
                type filter hook input priority 0; policy accept;
                tcp flags & (syn | ack) == syn ip saddr {{ {ours} }} tcp dport {ports["port"]}-{ports["endPort"]} accept
                tcp flags & (syn | ack) == syn drop
            }}
        }}"""
    assert worker.accepts(stranger, ssh["containerPort"])
    worker.on_network("nft", rules)
    assert not worker.accepts(stranger, ssh["containerPort"])
    assert worker.accepts(cluster.launcher, ssh["containerPort"])
    assert log_in(cluster.launcher) == 0
