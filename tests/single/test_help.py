"""The commands present themselves: help, version, the list of commands, completion in real shells."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import pytest

from cnnopt.__main__ import COMMANDS
from cnnopt.config import TrainConfig, parser
from cnnopt.presets import PRESETS, SUMMARIES
from tests.helpers import ROOT

HEAVY = {"tensorflow", "tf_keras", "horovod", "sklearn", "tensorflow_model_optimization", "matplotlib", "rich"}


def run(*command: str, width: int = 80) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": str(width)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("command", [*COMMANDS, "python -m cnnopt", "python -m cnnopt.export.latency"])
def test_help_fits_80_columns_and_loads_nothing_heavy(command):
    done = run(sys.executable, "-X", "importtime", *command.split()[1:], "--help")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert not re.search(r"(?m)^ *\S.*``", done.stdout)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "cnnopt" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("command", [*COMMANDS, "python -m cnnopt"])
def test_every_command_has_the_version(command):
    done = run(sys.executable, *command.split()[1:], "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cnnopt 0.1.0\n", "")


def test_the_list_has_every_command_on_one_line():
    done = run(sys.executable, "-m", "cnnopt")
    for command, about in COMMANDS.items():
        assert re.search(rf"(?m)^  {re.escape(command)} +{re.escape(about)}$", done.stdout)


def test_the_list_is_complete():
    modules = [path for path in (ROOT / "cnnopt").glob("*.py") if path.stem != "__main__"]
    programs = {f"python -m cnnopt.{p.stem}" for p in modules if '__name__ == "__main__"' in p.read_text()}
    assert programs | {"python train_hvd.py"} == COMMANDS.keys()


def test_the_flags_of_training_are_in_groups_with_their_defaults():
    help = parser().format_help()
    groups = ["data", "network", "training", "pruning", "precision", "exchange", "step", "saving", "running"]
    assert re.findall(r"(?m)^(\w+):$", help) == ["options", *groups, "presets", "example"]
    for field in dataclasses.fields(TrainConfig):
        flag = f"--{field.name.replace('_', '-')}"
        (text,) = re.findall(rf"(?ms)^  {flag}[ ,\n].*?(?=^  --|^\w)", help)
        if field.default is not None and field.default != "" and not isinstance(field.default, bool):
            assert " ".join(text.split()).endswith(f"[{field.default}]"), flag


def test_every_preset_is_explained():
    assert SUMMARIES.keys() == PRESETS.keys()
    for preset, summary in SUMMARIES.items():
        assert re.search(rf"(?m)^  {preset} +{re.escape(summary)}$", parser().format_help())


#: What is typed, and all that the shell offers.
TYPED = {
    "python train_hvd.py --sp": {"--sparsity", "--sparsity-schedule", "--sparsity-scope"},
    "./train_hvd.py --preset stu": {name for name in PRESETS if name.startswith("study-")},
    "horovodrun -np 2 python /x/train_hvd.py --depth 20 --optimizer ": {"sgd", "muon", "adam"},
    "python -m cnnopt.launch -np 2 -- python train_hvd.py --wire-dtype bf": {"bfloat16"},
    "python3 -m cnnopt.quantize --cl": {"--clusters"},
    "python -m cnnopt.qua": {"cnnopt.quantize"},
    "python something.py --sp": set(),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        done = run(sys.executable, "-m", "cnnopt", "--print-completion", shell)
        assert done.returncode == 0, done.stderr
        (folder / shell).write_text(done.stdout)
    return folder


def test_bash_completes_every_command(scripts):
    source = f"""eval "$(<{scripts}/bash)"
for typed in "$@"; do
  COMP_WORDS=($typed); [[ $typed == *" " ]] && COMP_WORDS+=("")
  COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
  _cnnopt 2>/dev/null
  echo "${{COMPREPLY[@]}}"
done"""
    expected = {**TYPED, "python -m cnnopt.predict docs/im": {"docs/images"}}
    done = run("bash", "-c", source, "bash", *expected)
    offered = map(set, map(str.split, done.stdout.split("\n")))
    assert dict(zip(expected, offered, strict=False)) == expected, done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_every_command(scripts):
    # An interactive zsh on a pseudo terminal. It says each match when Tab is pressed, and ends.
    (scripts / ".zshrc").write_text(f"""autoload -U compinit; compinit -D -u; eval "$(<{scripts}/zsh)"
compadd() {{
  local -a hits; [[ " $* " == *" -[OAD] "* ]] || builtin compadd -A hits "$@"
  (( $#hits )) && print -l -- "hit:"$^hits; builtin compadd "$@"
}}
comppostfuncs=(exit)""")
    source = """zmodload zsh/zpty; zpty z zsh -i; zpty -n -w z "$1"$'\\t'; while zpty -r z; do :; done"""
    for typed, expected in TYPED.items():
        done = subprocess.run(
            ["zsh", "-f", "-c", source, "zsh", typed],
            cwd=ROOT, env={**os.environ, "ZDOTDIR": str(scripts)}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert set(re.findall(r"hit:(\S+)\n", done.stdout)) == expected, (typed, done.stdout, done.stderr)
