"""Prints the Apptainer definition of the image for slurm/, made from the lines of the Dockerfile.

    python3 docker/apptainer.py cpu > cnnopt.def          # or gpu
    apptainer build --fakeroot cnnopt.sif cnnopt.def      # in the repository; neither Docker nor root is needed

The image holds Python and the packages. cnnopt itself comes from the repository, which slurm/common.sh binds into the
image. sshd is left out. This script needs only the standard library, of any Python from 3.8.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

DOCKERFILE = Path(__file__).with_name("Dockerfile")
if TYPE_CHECKING:
    #: An instruction and the rest of its line.
    Instruction = tuple[str, str]


def stages(text: str) -> dict[str, tuple[str, list[Instruction]]]:
    """The stages of a Dockerfile by name: the image or stage that each starts from, and its instructions."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    found: dict[str, tuple[str, list[Instruction]]] = {}
    for line in filter(None, lines):
        word, rest = line.split(" ", 1)
        if word == "FROM":
            parent, name = rest.split(" AS ")
            found[name] = (parent, instructions := [])
        else:
            instructions.append((word, re.sub(r"\s+", " ", rest)))
    return found


def definition(text: str, target: str) -> str:
    """The definition for ``target``, cpu or gpu: one stage builds /opt/venv, and the final stage gets a copy."""
    known = stages(text)

    def chain(name: str) -> tuple[str, list[Instruction]]:
        parent, own = known[name]
        image, inherited = chain(parent) if parent in known else (parent, [])
        return image, inherited + own

    image, build = chain(f"build-{target}")
    _, base = chain("base")
    environment = [rest for word, rest in chain(target)[1] if word == "ENV"]
    # An image from which files are copied is a stage too.
    sources = [rest.split()[0][len("--from=") :] for _, rest in build if rest.startswith("--from=")]
    parts = [_stage(source, f"source{i}", [], {}) for i, source in enumerate(sources)]
    named = {source: f"source{i}" for i, source in enumerate(sources)}
    parts.append(_stage(image, "build", build, named))
    parts.append(_stage(image, "final", [*base, ("COPY", "--from=build /opt/venv /opt/venv")], {"build": "build"}))
    exports = [f"    export {part}" for rest in environment for part in _assignments(rest)]
    return "\n".join([*parts, "%environment", *exports]) + "\n"


def _stage(image: str, name: str, instructions: list[Instruction], named: dict[str, str]) -> str:
    lines = ["Bootstrap: docker", f"From: {image}", f"Stage: {name}", ""]
    post, folder = [], PurePosixPath("/")
    for word, rest in instructions:
        if word == "RUN":
            # Apptainer ends a build at a command that fails, but "sh -e" overlooks one before "&&". It does not
            # overlook a subshell. As in Docker, the variables of one RUN line are unknown to the next.
            post.append(f"( {rest} )")
        elif word in ("ENV", "ARG"):
            post += [f"export {part}" for part in _assignments(rest)]
        elif word == "WORKDIR":
            folder = PurePosixPath(rest)
            post += [f"mkdir -p {rest}", f"cd {rest}"]
        elif word == "COPY":
            # Apptainer copies before all commands, Docker between them. No command makes or changes the copied files.
            *copied, to = rest.split()
            lines.append(f"%files from {named[copied.pop(0)[7:]]}" if rest.startswith("--from=") else "%files")
            for path in copied:
                at = folder / to / PurePosixPath(path).name if to.endswith("/") else folder / to
                lines.append(f"    {path} {at}")
        else:
            raise ValueError(f"{word} {rest}: has no counterpart in a definition; add it to docker/apptainer.py")
    return "\n".join([*lines, *(["%post", *(f"    {line}" for line in post)] if post else []), ""])


def _assignments(rest: str) -> list[str]:
    # Values may refer to earlier ones, as in the Dockerfile.
    return [f'{key}="{value}"' for key, value in (part.split("=", 1) for part in shlex.split(rest))]


def main(argv: list[str]) -> int:
    """Print the definition. Any other command line than one target gives one line of error."""
    if argv not in (["cpu"], ["gpu"]):
        print("apptainer.py: give the target, cpu or gpu", file=sys.stderr)
        return 2
    print(definition(DOCKERFILE.read_text(), argv[0]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
