"""The number of ranks for each host, and refused starts; tests/cluster/test_elastic_hosts.py starts ranks."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cnnopt import elastic
from cnnopt.config import ConfigError
from tests.helpers import ROOT
from tests.helpers.permissions import stopped_by_permissions


@pytest.mark.parametrize(
    ("hosts", "most", "ranks"),
    [
        ({"a": 4}, 4, 4),
        ({"a": 2, "b": 1}, 4, 3),
        ({"a": 4, "b": 4}, 7, 6),
        ({"a": 9}, 9, 8),
        ({"a": 0}, 4, 0),
        ({}, 4, 0),
    ],
)
def test_as_many_ranks_as_fit_and_divide_the_batch(hosts, most, ranks):
    assert elastic.ranks_on(hosts, 120, most) == ranks


def test_no_slot_is_given_beyond_the_ranks():
    assert elastic.places_of({"a": 2, "b": 0, "c": 4, "d": 1}, 5) == {"a": 2, "c": 3}
    assert elastic.places_of({"a": 4}, 3) == {"a": 3}


@pytest.mark.parametrize(
    ("hosts", "restart"),
    [
        ({"a": 2, "b": 1}, False),
        ({"b": 1, "a": 2}, False),
        ({"c": 4, "a": 2, "b": 1}, True),
        ({"a": 2, "b": 2}, True),
        ({"a": 1, "b": 2}, True),
        ({"a": 2}, True),
        ({"a": 2, "c": 1}, True),
        ({}, True),
    ],
)
def test_a_run_is_started_again_where_it_has_lost_a_slot_or_could_have_more_ranks(hosts, restart):
    assert elastic.changed(hosts, {"a": 2, "b": 1}, batch_size=120, most=4) == restart


def test_hosts_that_buy_no_rank_do_not_disturb_a_run():
    assert not elastic.changed({"b": 4, "a": 4}, {"a": 4}, batch_size=120, most=4)
    assert not elastic.changed({"a": 4, "b": 3}, {"a": 4, "b": 2}, batch_size=120, most=7)


def test_a_script_that_has_worked_may_fail_for_a_while(tmp_path):
    assert elastic.look_again(script(tmp_path, "echo a:4"), {"b": 1}) == {"a": 4}
    assert elastic.look_again(script(tmp_path, "exit 1"), {"b": 1}) == {"b": 1}


def script(folder, body: str, name: str = "hosts.sh") -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_hosts_are_lines_of_a_name_and_slots(tmp_path):
    assert elastic.discover(script(tmp_path, "echo a:4; echo b")) == {"a": 4, "b": 1}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo a:many", "printed 'a:many'; it must print lines host:slots"),
        ("echo b:1; echo a slots=2", "printed 'a slots=2'; it must print lines host:slots"),
        ("echo a:-2", "printed 'a:-2'; it must print lines host:slots"),
        ("echo no such queue >&2; exit 3", "ended with 3: no such queue"),
    ],
)
def test_a_script_that_fails_is_one_line(tmp_path, body, reason):
    path = script(tmp_path, body)
    with pytest.raises(ConfigError, match=rf"^--host-discovery-script {path}: .*{reason}"):
        elastic.discover(path)
    with pytest.raises(ConfigError, match=r"^--host-discovery-script /absent: .*No such file"):
        elastic.discover("/absent")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --max-np, --host-discovery-script; see --help"),
        (["--max-np", "2", "--min-np", "3"], "--min-np 3 --max-np 2: must be 1 or more, and in order"),
        (["--max-np", "2", "--depth", "9"], "--depth 9: the depth of a CIFAR ResNet is 6n+2; the nearest is 8"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, message, capsys):
    given = [*arguments, "--host-discovery-script", "/absent"] if arguments else []
    assert elastic.main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"cnnopt.elastic: {message}")
    assert said.count("\n") == 1


HELD = """
import signal, sys
from cnnopt import elastic
# These tests may run under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
elastic.find_horovodrun = lambda: sys.argv[1]
sys.exit(elastic.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_no_run_goes_on_without_it(tmp_path, number):
    pid = tmp_path / "pid"
    launcher = script(tmp_path, f"echo $$ > {pid}.part; mv {pid}.part {pid}; exec sleep 60", "launcher.sh")
    hosts = script(tmp_path, "echo a:1")
    flags = ["--max-np", "1", "--host-discovery-script", hosts, "--run-dir", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", HELD, launcher, *flags], cwd=ROOT) as supervisor:
        try:
            while not pid.exists() and supervisor.poll() is None:
                time.sleep(0.05)
            supervisor.send_signal(number)
            assert supervisor.wait(timeout=30) == os.EX_TEMPFAIL
        finally:
            supervisor.kill()
    assert not psutil.pid_exists(int(pid.read_text()))


def test_a_launcher_that_answers_0_too_early_is_started_again(tmp_path):
    launcher, hosts = script(tmp_path, "exit 0", "launcher.sh"), script(tmp_path, "echo a:1")
    flags = ["--max-np", "1", "--host-discovery-script", hosts, "--run-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", HELD, launcher, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "3 starts in a row ended without a new checkpoint" in done.stderr


def test_hosts_that_do_not_come_are_not_waited_for_without_an_end(tmp_path):
    launcher, hosts = script(tmp_path, "exit 0", "launcher.sh"), script(tmp_path, "echo a:1")
    flags = ["--min-np", "2", "--max-np", "2", "--host-discovery-script", hosts, "--run-dir", str(tmp_path)]
    command = [sys.executable, "-c", HELD, launcher, *flags, "--elastic-timeout", "0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        "cnnopt.elastic: --min-np 2: 1 slots, of which 1 divide --batch-size 128, after 0.5 s; give a longer "
        "--elastic-timeout, and the same command goes on\n"
    )


def test_a_home_that_may_not_be_written_stops_no_launcher(tmp_path):
    home, hosts = tmp_path / "home", script(tmp_path, "echo localhost:1")
    home.mkdir()
    # Each start ends at once, because there is no data; one is enough.
    code = "import sys; from cnnopt import elastic; elastic.FRUITLESS = 1; sys.exit(elastic.main(sys.argv[1:]))"
    flags = ["--max-np", "1", "--host-discovery-script", hosts, "--run-dir", str(tmp_path), "--data-dir", str(home)]
    command = stopped_by_permissions([sys.executable, "-c", code, *flags])
    home.chmod(0o500)
    done = subprocess.run(
        command, env={**os.environ, "HOME": str(home)}, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert f"train_hvd.py: --data-dir {home}: holds no cifar10" in done.stdout + done.stderr
    assert "Permission" not in done.stdout + done.stderr


def test_a_launcher_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(elastic, "GRACE", 0.5)
    stubborn = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"]
    with subprocess.Popen(stubborn, start_new_session=True, stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == b"ready\n"
        elastic.Job(job, elastic.Program.marked(), hosts=()).end()
        assert job.wait(30) == -signal.SIGKILL


def test_without_horovodrun_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="horovodrun: not found; activate"):
        elastic.find_horovodrun()
    path = script(tmp_path, "exit 0", "horovodrun")
    assert elastic.find_horovodrun() == path
