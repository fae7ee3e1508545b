"""The rendered Kubernetes manifests: valid for the cluster and the operator, and consistent with the image."""

import copy
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cnnopt.config import parse_args
from tests.helpers import ROOT
from tests.helpers import manifests as overlays
from tests.helpers.manifests import OVERLAYS, TRAINJOB, Manifests, TrainJob

#: Kind -> the variable that names its CRD, and where it is looked for without.
CRDS = {
    "MPIJob": ("CNNOPT_MPIJOB_CRD", "mpijob-crd-v2beta1.yaml"),
    "TrainJob": ("CNNOPT_TRAINJOB_CRD", "trainer-trainjobs-crd-v1alpha1.yaml"),
    "TrainingRuntime": ("CNNOPT_TRAININGRUNTIME_CRD", "trainer-trainingruntimes-crd-v1alpha1.yaml"),
}
GROUPS = {"MPIJob": "kubeflow.org", "TrainJob": "trainer.kubeflow.org", "TrainingRuntime": "trainer.kubeflow.org"}
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
CPU = {"requests": {"cpu": "4", "memory": "8Gi"}, "limits": {"cpu": "4", "memory": "8Gi"}}
GPU_SIZE = {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": 4}
GPU = {"requests": GPU_SIZE, "limits": GPU_SIZE}


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return overlays.of(request.param)


@pytest.fixture(params=[name for name in OVERLAYS if name != TRAINJOB])
def mpijob(request: pytest.FixtureRequest) -> Manifests:
    return Manifests(request.param)


@pytest.fixture
def trainjob() -> TrainJob:
    return TrainJob(TRAINJOB)


def closed(schema: dict) -> dict:
    """The schema, refusing fields that it does not know; a cluster would drop them without a word."""
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for value in list(schema.values()):
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                closed(part)
    return schema


@functools.cache
def validator(kind: str) -> jsonschema.Draft7Validator:
    """For the documents of a custom resource; skips the test where its CRD is not at hand."""
    variable, name = CRDS[kind]
    path = Path(os.environ.get(variable, ROOT.parent / "shared/k8s" / name))
    if not path.exists():
        if variable in os.environ:
            pytest.fail(f"{variable}: there is no {path}")
        pytest.skip(f"the CRD of {kind} is not beside the repository, and {variable} does not name it")
    # Half a megabyte: seconds without libyaml.
    documents = yaml.load_all(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    ((version,),) = [document["spec"]["versions"] for document in documents if document]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"] |= {
        "metadata": {"type": "object"},
        "apiVersion": {"const": f"{GROUPS[kind]}/{version['name']}"},
        "kind": {"const": kind},
    }
    return jsonschema.Draft7Validator(closed(schema))


def validate_core(document: dict) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_core_documents_are_valid(manifests):
    kinds = [document["kind"] for document in manifests.documents]
    custom = ["TrainJob", "TrainingRuntime"] if manifests.overlay == TRAINJOB else ["MPIJob"]
    assert sorted(kinds) == sorted(
        ["Deployment", "Job", *custom, *["NetworkPolicy"] * 3, *["PersistentVolumeClaim"] * 2, "Service"]
    )
    for document in manifests.documents:
        if document["kind"] not in CRDS:
            validate_core(document)


def test_a_wrong_field_would_be_found(manifests):
    manifests.of("Job")[0]["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        validate_core(manifests.of("Job")[0])


def test_the_job_is_valid_for_its_controller(manifests):
    for document in (document for document in manifests.documents if document["kind"] in CRDS):
        validator(document["kind"]).validate(document)
        wrong = copy.deepcopy(document)
        wrong["spec"]["bakoffLimit"] = {}
        with pytest.raises(jsonschema.ValidationError, match="bakoffLimit"):
            validator(document["kind"]).validate(wrong)


def test_a_wrong_field_of_a_pod_would_be_found(mpijob, trainjob):
    mpijob.container("Worker")["readynessProbe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="readynessProbe"):
        validator("MPIJob").validate(mpijob.job)
    node = trainjob.runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    node["containers"][0]["readynessProbe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="readynessProbe"):
        validator("TrainingRuntime").validate(trainjob.runtime)


def test_the_pods_that_the_operator_makes_are_valid(manifests):
    # Its schema for a pod may be older than the cluster's.
    for role, template in ((role, manifests.replica(role)["template"]) for role in ("Launcher", "Worker")):
        restart = manifests.replica(role)["restartPolicy"]
        # The operator overrides a policy in the template, with a warning, and knows these two.
        assert ("restartPolicy" in template["spec"]) == (manifests.overlay == TRAINJOB)
        assert restart in ("Never", "OnFailure")
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role.lower()}, "spec": template["spec"]}
        validate_core(pod)


def test_names_are_dns_labels(manifests):
    names = [document["metadata"]["name"] for document in manifests.documents]
    assert manifests.job["metadata"]["name"] == manifests.name
    names += [manifests.launcher, manifests.worker(manifests.workers - 1)]
    for spec, container in manifests.containers():
        names += [container["name"], *(volume["name"] for volume in spec["volumes"])]
        ports = [port["name"] for port in container.get("ports", [])]
        assert all(len(port) <= 15 for port in ports)
        names += ports
    assert all(DNS_LABEL.fullmatch(name) for name in names), names
    assert len({(d["kind"], d["metadata"]["name"]) for d in manifests.documents}) == len(manifests.documents)


def test_each_mount_has_a_volume_and_each_claim_can_be_shared(manifests):
    claims = {claim["metadata"]["name"]: claim for claim in manifests.of("PersistentVolumeClaim")}
    used = set()
    for spec, container in manifests.containers():
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for mount in container["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "persistentVolumeClaim" in volume:
                used.add(volume["persistentVolumeClaim"]["claimName"])
                # The same folder holds the same volume wherever it is mounted.
                assert volume["persistentVolumeClaim"]["claimName"] == f"cnnopt-{mount['mountPath'].strip('/')}"
    assert used == set(claims)
    assert all(claim["spec"]["accessModes"] == ["ReadWriteMany"] for claim in claims.values())


def test_every_container_is_locked_down(manifests):
    for spec, container in manifests.containers():
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        for bound in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][bound].keys()
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()


@pytest.mark.parametrize(
    ("overlay", "tag", "slots", "resources", "shm"),
    [
        ("cpu", "cpu", 1, CPU, "1Gi"),
        ("elastic", "cpu", 1, CPU, "1Gi"),
        ("gpu", "gpu", 4, GPU, "8Gi"),
        ("kueue", "gpu", 4, GPU, "8Gi"),
        ("trainjob", "gpu", 4, GPU, "8Gi"),
        ("volcano", "gpu", 4, GPU, "8Gi"),
    ],
)
def test_the_size_of_each_overlay(overlay, tag, slots, resources, shm):
    manifests = overlays.of(overlay)
    images = {container["image"] for _, container in manifests.containers()}
    assert images == {f"registry.example.com/cnnopt:0.1.0-{tag}"}
    assert manifests.slots == slots
    worker = manifests.container("Worker")
    assert worker["resources"] == resources
    # One rank to each GPU, and none on the launcher.
    assert worker["resources"]["limits"].get("nvidia.com/gpu", slots) == slots
    assert "nvidia.com/gpu" not in manifests.container("Launcher")["resources"]["limits"]
    (memory,) = (v for v in manifests.replica("Worker")["template"]["spec"]["volumes"] if v["name"] == "shm")
    assert memory["emptyDir"] == {"medium": "Memory", "sizeLimit": shm}
    assert {"name": "shm", "mountPath": "/dev/shm"} in worker["volumeMounts"]


def test_the_job_starts_retries_and_ends_as_documented(manifests):
    # A launcher is a new pod for each try; sshd is started again in its place.
    assert manifests.replica("Launcher")["restartPolicy"] == "Never"
    assert manifests.replica("Worker")["restartPolicy"] == "OnFailure"
    assert manifests.replica("Launcher")["replicas"] == 1
    assert manifests.workers == (4 if manifests.overlay == "elastic" else 2)
    worker = manifests.container("Worker")
    assert worker["command"] == ["/usr/sbin/sshd", "-De"]
    assert worker["readinessProbe"]["tcpSocket"] == {"port": "ssh"}
    assert "pkill -TERM python" in worker["lifecycle"]["preStop"]["exec"]["command"][2]
    assert manifests.container("Launcher")["command"] == ["/opt/cnnopt/k8s/launch.sh"]


def test_the_operator_starts_and_retries_the_launcher(mpijob):
    spec = mpijob.job["spec"]
    assert spec["launcherCreationPolicy"] == ("AtStartup" if mpijob.overlay == "elastic" else "WaitForWorkersReady")
    assert spec["runPolicy"]["cleanPodPolicy"] == "Running"
    assert spec["runPolicy"]["backoffLimit"] == 6


def test_trainer_starts_and_retries_the_launcher(trainjob):
    jobset = trainjob.runtime["spec"]["template"]["spec"]
    node, launcher = jobset["replicatedJobs"]
    assert launcher["dependsOn"] == [{"name": "node", "status": "Ready"}]
    assert jobset["successPolicy"]["targetReplicatedJobs"] == ["launcher"]
    # The default makes a new launcher while the deleted one still waits for its ranks. A node's sshd ends with 0, and
    # with this policy a node that is deleted would count as complete.
    assert trainjob.replica("Launcher")["job"]["podReplacementPolicy"] == "Failed"
    assert "podReplacementPolicy" not in trainjob.replica("Worker")["job"]
    assert trainjob.replica("Launcher")["job"]["backoffLimit"] == trainjob.replica("Worker")["job"]["backoffLimit"] == 6
    # What Trainer gives to the launcher alone: with them, our image would meet a node without sshd (trainer 4030).
    assert not {"image", "command", "resourcesPerNode"} & trainjob.job["spec"]["trainer"].keys()
    # One container a pod, which has Trainer's name, as its webhook wants it.
    for job in (node, launcher):
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        assert container["name"] == "node"
    assert trainjob.job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": "cnnopt"}
    assert trainjob.runtime["metadata"]["name"] == "cnnopt"


def test_the_runtime_is_there_before_the_trainjob(trainjob):
    # Trainer's webhook refuses a TrainJob without its runtime (pkg/runtime/core/trainingruntime.go, ValidateObjects).
    kinds = [document["kind"] for document in trainjob.documents]
    assert kinds.index("TrainingRuntime") < kinds.index("TrainJob")


def test_trainjob_and_mpijob_run_the_same_pods(trainjob):
    mpijob = Manifests("gpu")
    for role in ("Launcher", "Worker"):
        ours, theirs = (m.replica(role)["template"]["spec"] for m in (trainjob, mpijob))
        for pod in (ours, theirs):
            (container,) = pod["containers"]
            # Trainer's: a name, the key, the hostfile, and variables.
            for key in ("name", "env"):
                container.pop(key, None)
            container["volumeMounts"] = [m for m in container["volumeMounts"] if not m["name"].startswith("mpi-")]
            pod["volumes"] = [v for v in pod["volumes"] if not v["name"].startswith("mpi-")]
            pod.pop("restartPolicy", None)
        assert ours == theirs
        own = {name: value for name, value in mpijob.variables(role).items() if name.isupper() and "MPI" not in name}
        own = {name: value for name, value in own.items() if not name.startswith("NVIDIA")}
        assert own.items() <= trainjob.variables(role).items()
    assert trainjob.slots == mpijob.slots
    assert trainjob.hostfile() == "cnnopt-node-0-0.cnnopt slots=4\ncnnopt-node-0-1.cnnopt slots=4\n"


def test_what_queues_and_gang_schedulers_need():
    kueue, volcano = Manifests("kueue").job, Manifests("volcano")
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "user-queue"
    # Kueue's to set: applied a second time, it would stop a job that runs.
    assert "suspend" not in kueue["spec"]["runPolicy"]
    # With the launcher counted in, which waits for the workers, the group would never be scheduled.
    policy = volcano.job["spec"]["runPolicy"]["schedulingPolicy"]
    assert policy == {"minAvailable": volcano.workers, "queue": "default"}
    for role in ("Launcher", "Worker"):
        assert volcano.replica(role)["template"]["spec"]["schedulerName"] == "volcano"


def test_the_flags_parse_and_the_ranks_share_the_batch(manifests):
    config = parse_args(manifests.container("Launcher")["args"])
    environment = {v["name"]: v["value"] for v in manifests.container("Launcher")["env"]}
    for workers in range(int(environment.get("LAUNCH_AT_LEAST", manifests.workers)), manifests.workers + 1):
        config.check_ranks(workers * manifests.slots)
    mounts = {mount["mountPath"] for mount in manifests.container("Worker")["volumeMounts"]}
    assert {environment["CNNOPT_DATA_DIR"], config.run_dir} <= mounts
    # The flag would forbid the download into an empty volume.
    assert config.data_dir is None
    limit = manifests.container("Worker")["resources"]["limits"]["cpu"]
    assert int(environment["TF_NUM_INTRAOP_THREADS"]) * manifests.slots == int(limit)


def test_quantize_and_tensorboard_look_where_the_training_writes(manifests):
    config = parse_args(manifests.container("Launcher")["args"])
    run = f"{config.run_dir}/{config.name}"
    (job,) = manifests.of("Job")
    pod = job["spec"]["template"]["spec"]
    assert f"[ -e {run}/result.json ]" in pod["initContainers"][0]["command"][2]
    assert pod["containers"][0]["command"] == ["python", "-m", "cnnopt.quantize"]
    environment = {v["name"]: v["value"] for v in manifests.container("Launcher")["env"]}
    assert pod["containers"][0]["args"] == [run, f"--data-dir={environment['CNNOPT_DATA_DIR']}"]
    (deployment,) = manifests.of("Deployment")
    assert f"--logdir={config.run_dir}" in deployment["spec"]["template"]["spec"]["containers"][0]["args"]


def test_services_and_policies_select_the_pods_they_are_meant_for(manifests):
    labels = {name: dict(template["metadata"]["labels"]) for name, template in manifests.pods()}
    (service,) = manifests.of("Service")
    selected = [name for name, have in labels.items() if service["spec"]["selector"].items() <= have.items()]
    assert selected == ["cnnopt-tensorboard"]
    for name in () if manifests.overlay == TRAINJOB else ("Launcher", "Worker"):
        # The operator adds these.
        labels[name] |= {
            "training.kubeflow.org/operator-name": "mpi-operator",
            "training.kubeflow.org/job-name": manifests.job["metadata"]["name"],
            "training.kubeflow.org/job-role": name.lower(),
        }
    covered = []
    for policy in manifests.of("NetworkPolicy"):
        spec = policy["spec"]
        wanted = spec["podSelector"]["matchLabels"]
        covered += [name for name, have in labels.items() if wanted.items() <= have.items()]
        assert spec["policyTypes"] == ["Ingress"]
        # Neither other namespaces nor addresses.
        assert all(peer.keys() == {"podSelector"} for rule in spec.get("ingress", []) for peer in rule["from"])
    # Each pod is under one policy, so what that does not admit is refused.
    assert sorted(covered) == sorted(labels)
    (training,) = (p["spec"] for p in manifests.of("NetworkPolicy") if p["metadata"]["name"] == "cnnopt-training")
    (rule,) = training["ingress"]
    assert rule["from"] == [{"podSelector": training["podSelector"]}]
    (ports,) = rule["ports"]
    (ssh,) = manifests.container("Worker")["ports"]
    assert ports["port"] <= ssh["containerPort"] <= ports["endPort"]


def test_overlays_change_what_they_say_and_nothing_else(mpijob):
    base = Manifests("base")

    def common(rendered: Manifests) -> list[dict]:
        documents = copy.deepcopy(rendered.documents)
        for document in documents:
            if document["kind"] == "MPIJob":
                spec = document["spec"]
                document["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name", None)
                spec["runPolicy"].pop("schedulingPolicy", None)
                del spec["slotsPerWorker"]
                worker = spec["mpiReplicaSpecs"]["Worker"]["template"]["spec"]
                del worker["containers"][0]["resources"]
                del worker["volumes"][1]["emptyDir"]["sizeLimit"]
                for replica in spec["mpiReplicaSpecs"].values():
                    replica["template"]["spec"].pop("schedulerName", None)
                if rendered.overlay == "elastic":
                    launcher = spec["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
                    assert launcher["env"].pop() == {"name": "LAUNCH_AT_LEAST", "value": "2"}
                    del launcher["args"][-1]
                    spec["mpiReplicaSpecs"]["Worker"]["replicas"] = base.workers
                    spec["launcherCreationPolicy"] = "WaitForWorkersReady"
        text = yaml.safe_dump_all(documents)
        return list(yaml.safe_load_all(re.sub(r"image: \S+", "image: any", text)))

    assert common(mpijob) == common(base)


# ---- The image is of one mind with the manifests --------------------------------------------------------------------


def directives(path: Path) -> dict[str, str]:
    lines = (line.split(None, 1) for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return {name: value.strip() for name, value in lines}


def test_the_image_runs_sshd_as_the_manifests_expect(manifests):
    server, client = directives(ROOT / "docker/sshd_config"), directives(ROOT / "docker/ssh_config")
    (port,) = manifests.container("Worker")["ports"]
    assert server["Port"] == client["Port"] == str(port["containerPort"]) == "2222"
    custom = manifests.runtime["spec"]["mlPolicy"]["mpi"] if manifests.overlay == TRAINJOB else manifests.job["spec"]
    mount = custom["sshAuthMountPath"]
    assert server["HostKey"] == client["IdentityFile"] == f"{mount}/id_rsa"
    assert server["AuthorizedKeysFile"] == f"{mount}/authorized_keys"
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    user = manifests.replica("Worker")["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"useradd --uid {user} " in dockerfile
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == [str(user)]
    assert server["AllowUsers"] == client["User"] == "mpiuser"


def test_all_that_the_image_copies_is_in_its_context_and_nothing_else():
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in sources)
    first, *rules = [r for r in (ROOT / ".dockerignore").read_text().splitlines() if r and not r.startswith("#")]
    assert first == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources


def test_the_gpu_lock_is_what_tensorflow_asks_for():
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in requires("tensorflow") or []]
    wanted = [r for r in wanted if r.marker and r.marker.evaluate({"extra": "and-cuda"}) and "nvidia" in r.name]
    lock = (ROOT / "docker/requirements-gpu.txt").read_text()
    locked = dict(re.findall(r"^(nvidia-\S+)==(\S+)", lock, re.MULTILINE))
    assert wanted
    for requirement in wanted:
        assert requirement.specifier.contains(locked[requirement.name]), requirement
    assert lock.count("--hash=sha256:") >= len(locked) == len(re.findall(r"^\S", lock, re.MULTILINE))


@pytest.mark.parametrize(
    ("tool", "file"), [("hadolint", "docker/Dockerfile"), ("shellcheck", "k8s/launch.sh"), ("bash", "k8s/launch.sh")]
)
def test_linters_have_nothing_to_say(tool, file):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([tool, *(["-n"] if tool == "bash" else []), ROOT / file], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# The host file ------------------------------------------------------------------------------------------------


def launch(
    tmp_path: Path, hostfile: bytes, *, ssh: str = "exit 0", horovodrun: str = 'echo "$@"', **more: str
) -> subprocess.CompletedProcess:
    """k8s/launch.sh with an ssh that reaches everybody and a horovodrun that prints its arguments, as texts for sh."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in (("ssh", ssh), ("horovodrun", horovodrun)):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "hostfile").write_bytes(hostfile)
    variables = {"PATH": f"{programs}:{os.environ['PATH']}", "LAUNCH_HOSTFILE": f"{tmp_path}/hostfile"}
    command = [ROOT / "k8s/launch.sh", "--epochs", "3"]
    return subprocess.run(command, env={**os.environ, **variables, **more}, capture_output=True, text=True, timeout=60)


def test_a_launcher_that_was_told_to_stop_never_counts_as_complete(tmp_path):
    # No rank is there yet, so pkill finds none. horovodrun then now and then answers 0.
    told = "trap 'exit 0' TERM; kill -TERM $PPID; while :; do sleep 0.1; done"
    done = launch(tmp_path, b"a slots=2\n", ssh="exit 1", horovodrun=told)
    assert done.returncode == 75, done.stderr


@pytest.mark.parametrize("variable", ["LAUNCH_PATIENCE", "LAUNCH_AT_LEAST"])
def test_a_number_that_is_none_stops_the_launch(tmp_path, variable):
    done = launch(tmp_path, b"a slots=2\n", **{variable: "10m"})
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{variable}=10m" in done.stderr
    assert done.stderr.endswith(": give whole numbers\n")


@pytest.mark.parametrize(("hostfile", "hosts", "ranks"), [
    (b"a slots=2\nb slots=1\n", "a:2,b:1", 3),
    (b"a slots=2\nb slots=1", "a:2,b:1", 3),
    (b"a:2\nb:1\n", "a:2,b:1", 3),
    (b"a slots=2\r\nb slots=1\r\n", "a:2,b:1", 3),
    (b"a:2\r\nb:1\r\n", "a:2,b:1", 3),
    (b"\n# workers\na slots=2   # two\n\n  b.c-0.svc  slots = 010\n\n", "a:2,b.c-0.svc:10", 12),
])  # fmt: skip
def test_a_host_file_is_read_in_each_form(tmp_path, hostfile, hosts, ranks):
    done = launch(tmp_path, hostfile)
    assert done.returncode == 0, done.stderr
    first, command = done.stdout.splitlines()
    workers = len(hosts.split(","))
    assert first == f"launch.sh: {ranks} ranks on {workers} of {workers} workers"
    assert f"--num-proc {ranks} --hosts {hosts} " in command
    assert command.endswith(f"--expect-ranks {ranks} --epochs 3")


@pytest.mark.parametrize(("hostfile", "said"), [
    (b"a\n", "line 1: 'a' is not understood"),
    (b"a slots=2\nb slots=\n", "line 2: 'b slots=' is not understood"),
    (b"a slots=2\nb slots=x\n", "line 2: 'b slots=x' is not understood"),
    (b"a slots=2 max_slots=4\n", "line 1: 'a slots=2 max_slots=4' is not understood"),
    (b"a slots=0\n", "line 1: no rank on a"),
    (b"a:4\na:4\n", "line 2: a is named twice"),
    (b"a b slots=2\n", "line 1: 'a b slots=2' is not understood"),
    (b"\n\n", "line 2: no worker is named"),
    (b"", "line 0: no worker is named"),
])  # fmt: skip
def test_a_line_of_the_host_file_that_is_not_understood_stops_the_launch(tmp_path, hostfile, said):
    done = launch(tmp_path, hostfile)
    assert (done.returncode, done.stdout) == (2, "")
    (message,) = done.stderr.splitlines()
    assert message.startswith(f"launch.sh: {tmp_path}/hostfile, {said}; write '<worker> slots=<ranks>'")
