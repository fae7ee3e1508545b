"""Every RUN line of the Dockerfile, executed in a clean Debian root; what comes out then starts and trains.

Where Apptainer is installed, it builds its definition from the same root, and two ranks train in that image.

Takes many minutes and gigabytes of downloads, so it is asked for by name, as root:

    CNNOPT_TEST_IMAGE=cpu python -m pytest tests/cluster/test_image.py
    CNNOPT_TEST_IMAGE=gpu CNNOPT_TEST_CUDA=/usr/local/cuda CUDA_ARCHITECTURES=80,90 \\
        python -m pytest tests/cluster/test_image.py

There is no registry of images here: debootstrap makes the root that FROM would fetch, and the CUDA toolkit, which the
Dockerfile copies from NVIDIA's image, is that of CNNOPT_TEST_CUDA; from CUDA 13 on it knows no architecture 70. As
root, `apptainer build --fakeroot` needs a line for root in /etc/subuid and /etc/subgid.
"""

import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

TARGET = os.environ.get("CNNOPT_TEST_IMAGE")
CUDA = os.environ.get("CNNOPT_TEST_CUDA", "")
pytestmark = [
    pytest.mark.timeout(3 * 3600),
    pytest.mark.skipif(TARGET not in ("cpu", "gpu"), reason="asked for with CNNOPT_TEST_IMAGE=cpu or gpu"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="debootstrap is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a root of its own needs root"),
]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name of each stage -> what it starts from, and its instructions."""
    lines = [line for line in (ROOT / "docker/Dockerfile").read_text().splitlines() if not line.startswith("#")]
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            instructions: list[tuple[str, str]] = []
            found[match[2]] = (match[1], instructions)
        elif line:
            word, rest = line.split(" ", 1)
            instructions.append((word, rest))
    return found


class Stage:
    """A root of its own over that of the stage it starts from, and the variables that hold in it."""

    def __init__(self, folder: Path, name: str, lower: list[Path], variables: dict[str, str], workdir: str) -> None:
        self.name, self.variables, self.folder = name, dict(variables), workdir
        upper, work, self.root = (folder / name / part for part in ("upper", "work", "root"))
        for path in (upper, work, self.root):
            path.mkdir(parents=True)
        self.layers = [upper, *lower]
        options = f"lowerdir={':'.join(map(str, lower))},upperdir={upper},workdir={work}"
        mount("-t", "overlay", "-o", options, "overlay", str(self.root))
        mount("-t", "proc", "proc", str(self.root / "proc"))
        # Not the machine's own /dev, which whoever removes what a killed test has left would empty: debootstrap has
        # made the devices.
        mount("-t", "tmpfs", "tmpfs", str(self.root / "dev/shm"))

    def inside(self, path: str) -> Path:
        return self.root / os.path.join(self.folder, path).lstrip("/")

    def run(self, command: str, user: str = "0") -> str:
        """A RUN line, or another shell command; returns its output."""
        words = [f"{name}={value}" for name, value in {**registry_settings(), **self.variables}.items()]
        chroot = ["chroot", f"--userspec={user}:{user}", str(self.root), "env", "-i", *words]
        done = subprocess.run(
            [*chroot, "/bin/sh", "-c", f"cd {self.folder} && {command}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{self.name}: {command}: {done.stdout[-4000:]}"
        return done.stdout

    def end(self) -> None:
        subprocess.run(["umount", "--recursive", "--lazy", str(self.root)], check=False)


class Build:
    """The stages that a target needs, made in order; FROM an image is a root made by debootstrap."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.stages: dict[str, Stage] = {}
        self.executed: list[str] = []

    def stage(self, name: str) -> Stage:
        if name in self.stages:
            return self.stages[name]
        parent, instructions = stages()[name]
        if parent in stages():
            above = self.stage(parent)
            lower, variables, workdir = above.layers, above.variables, above.folder
        else:
            lower, variables, workdir = [self.base], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, "/"
        made = self.stages[name] = Stage(self.folder, name, lower, variables, workdir)
        for word, rest in instructions:
            if word == "RUN":
                made.run(rest)
                self.executed.append(rest)
            elif word == "ENV":
                for key, value in (part.split("=", 1) for part in shlex.split(rest)):
                    made.variables[key] = string.Template(value).substitute(made.variables)
            elif word == "ARG":
                key, value = rest.split("=", 1)
                made.variables[key] = os.environ.get(key, value)
            elif word == "WORKDIR":
                made.folder = rest
                made.inside(".").mkdir(parents=True, exist_ok=True)
            elif word == "COPY":
                self.copy(made, rest.split())
            else:
                assert word in ("USER", "CMD"), word
        return made

    def copy(self, to: Stage, words: list[str]) -> None:
        origin, *words = words if words[0].startswith("--from=") else ["", *words]
        *sources, target = words
        for source in sources:
            if not origin:
                found = ROOT / source
            elif (stage := origin.removeprefix("--from=")) in stages():
                found = self.stage(stage).inside(source)
            else:
                assert CUDA, f"{stage} stands for a CUDA toolkit: give its folder in CNNOPT_TEST_CUDA"
                found = Path(CUDA).resolve()
            at = to.inside(target)
            if not found.is_dir() and target.endswith("/"):
                at = at / found.name
            at.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", str(found), str(at)], check=True)

    def end(self) -> None:
        for stage in reversed(self.stages.values()):
            stage.end()


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def registry_settings() -> dict[str, str]:
    """How this machine reaches its package registries, and how busy a build may make it."""
    names = re.compile(r"(?i)(https?|no|ftp)_proxy|PIP_.*|UV_.*|SSL_CERT_.*|REQUESTS_CA_BUNDLE|MAKEFLAGS")
    return {name: value for name, value in os.environ.items() if names.fullmatch(name)}


def run(command: list[str], environment: dict[str, str]) -> str:
    """A command in the repository; returns its output."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("debian")
    # As in FROM: Debian 13, with nothing but the essential packages and apt.
    subprocess.run(["debootstrap", "--variant=minbase", "trixie", str(base)], check=True, capture_output=True)
    # Names, as an engine writes them into a container, and the certificates that this machine trusts.
    for path in (Path("/etc/resolv.conf"), Path("/etc/hosts"), *Path("/usr/local/share/ca-certificates").glob("*.crt")):
        (base / str(path)[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, base / str(path)[1:])
    yield base
    shutil.rmtree(base)


@pytest.fixture
def build(debian: Path, tmp_path: Path) -> Iterator[Build]:
    made = Build(tmp_path, debian)
    yield made
    made.end()
    shutil.rmtree(tmp_path)


TINY = shlex.split("--dataset synthetic --depth 8 --epochs 1 --batch-size 64 --precision float32 --name image")


def test_the_run_lines_make_an_image_that_trains(build):
    image = build.stage(str(TARGET))
    assert build.executed == [rest for name in build.stages for word, rest in stages()[name][1] if word == "RUN"]
    assert "--sparsity" in image.run("python train_hvd.py --help", user="1000")
    train = shlex.join(["train_hvd.py", *TINY, "--run-dir", "/tmp/runs"])
    said = image.run(f"horovodrun --gloo -np 2 python {train}", user="1000")
    assert "epoch   1/1" in said


@pytest.mark.skipif(TARGET != "cpu", reason="only the definition for cpu is built")
@pytest.mark.skipif(shutil.which("apptainer") is None, reason="Apptainer is not installed")
def test_apptainer_builds_its_definition_and_the_image_trains(debian, tmp_path):
    base, file, image = tmp_path / "debian", tmp_path / "cnnopt.def", tmp_path / "cnnopt.sif"
    # Apptainer brings devices of its own. A user, who cannot make any, cannot copy them.
    subprocess.run(["cp", "-a", str(debian), str(base)], check=True)
    shutil.rmtree(base / "dev")
    (base / "dev").mkdir()
    print_it = [sys.executable, str(ROOT / "docker/apptainer.py"), str(TARGET)]
    text = subprocess.run(print_it, stdout=subprocess.PIPE, text=True, check=True).stdout
    text, found = re.subn(r"docker\nFrom: debian:\S+", f"localimage\nFrom: {base}", text)
    assert found == 2
    file.write_text(text)
    settings = {f"APPTAINERENV_{name}": value for name, value in registry_settings().items()}
    environment = {**os.environ, **settings, "APPTAINER_TMPDIR": str(tmp_path)}
    run(["apptainer", "build", "--fakeroot", str(image), str(file)], environment)
    # As slurm/common.sh puts a rank into the image.
    inside = ["apptainer", "exec", "--bind", f"{ROOT},{tmp_path}", "--pwd", str(ROOT), str(image)]
    train = ["python", "train_hvd.py", *TINY, "--run-dir", str(tmp_path / "runs"), "--expect-ranks", "2"]
    launch = [sys.executable, "-m", "cnnopt.launch", "-np", "2", "--"]
    assert "epoch   1/1" in run([*launch, *inside, *train], dict(os.environ))
