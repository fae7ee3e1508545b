"""The Apptainer definition has the Dockerfile's lines, which tests/cluster/test_image.py carries out."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.helpers import ROOT

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()


def run_lines(*names: str) -> list[str]:
    """The RUN lines of some stages of the Dockerfile, each with single spaces, and in a subshell."""
    parts = re.split(r"^FROM \S+ AS (\S+)\n", DOCKERFILE, flags=re.MULTILINE)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    text = "\n".join(re.sub(r"^#.*\n", "", bodies[name], flags=re.MULTILINE) for name in names).replace("\\\n", " ")
    return [f"( {' '.join(line.split())} )" for line in re.findall(r"^RUN (.*)$", text, re.MULTILINE)]


@pytest.fixture(params=["cpu", "gpu"])
def target(request: pytest.FixtureRequest) -> str:
    return request.param


def definition(target: str) -> str:
    command = [sys.executable, "-S", str(ROOT / "docker/apptainer.py"), target]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sections(text: str, stage: str) -> dict[str, list[str]]:
    """Of one stage: name of a section -> its lines; those of the same name together."""
    (body,) = (part for part in text.split("Bootstrap: docker\n") if f"\nStage: {stage}\n" in part)
    found: dict[str, list[str]] = {}
    name = ""
    for line in filter(str.strip, body.splitlines()):
        if line.startswith("%"):
            name = line
        found.setdefault(name, []).extend([line.strip()] if line.startswith("    ") else [])
    return found


def test_it_runs_what_the_dockerfile_runs(target):
    text = definition(target)
    lines = [" ".join(line.split()) for line in sections(text, "build")["%post"]]
    wanted = run_lines("base", "tools", f"build-{target}")
    assert len(wanted) >= 5
    assert [line for line in lines if line in wanted] == wanted
    assert all(line.startswith(("export ", "mkdir -p ", "cd ")) for line in lines if line not in wanted)
    assert sections(text, "final")["%post"] == run_lines("base")
    for stage in ("build", "final"):
        script = "\n".join(sections(text, stage)["%post"])
        assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0


def test_a_run_line_that_fails_ends_the_build(target, tmp_path):
    (tmp_path / "apt-get").write_text(f"#!/bin/sh\necho $1 >>{tmp_path}/calls\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    script = "\n".join(sections(definition(target), "build")["%post"])
    # As Apptainer runs it. With this PATH it finds no command that could change the machine.
    done = subprocess.run(["/bin/sh", "-e"], input=script, text=True, env={"PATH": str(tmp_path)}, cwd=tmp_path)
    assert (done.returncode, (tmp_path / "calls").read_text()) == (100, "update\n")


def test_it_copies_what_is_there(target):
    text = definition(target)
    copied = [line.split() for line in sections(text, "build")["%files"]]
    assert {to for _, to in copied} >= {"/build/pyproject.toml", "/build/requirements.txt"}
    assert all((ROOT / source).exists() for source, _ in copied)
    assert sections(text, "final")["%files from build"] == ["/opt/venv /opt/venv"]
    others = re.findall(r"^COPY --from=(\S+[:/]\S+) (.*)$", DOCKERFILE, re.MULTILINE) if target == "gpu" else []
    for number, (image, paths) in enumerate(others):
        assert f"From: {image}\nStage: source{number}\n" in text
        assert sections(text, "build")[f"%files from source{number}"] == [paths]


def test_its_variables_are_those_of_the_image(target):
    stage = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    (runtime, own) = (next(s for s in stage if s.split("\n")[0].endswith(f" AS {n}")) for n in ("runtime", target))
    words = shlex.split(" ".join(re.findall(r"^ENV (.*)$", (runtime + own).replace("\\\n", " "), re.MULTILINE)))
    exported = "\n".join(sections(definition(target), "final")["%environment"])
    shell = subprocess.run(
        ["env", "-i", "sh", "-c", f"{exported}\nenv"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert set(words) <= set(shell)


@pytest.mark.parametrize("argv", [[], ["tpu"], ["cpu", "gpu"]])
def test_wrong_input_is_one_line(argv):
    done = subprocess.run([sys.executable, ROOT / "docker/apptainer.py", *argv], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "apptainer.py: give the target, cpu or gpu\n"
