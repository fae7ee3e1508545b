"""Starts the program in every kind of place and with every kind of input, and judges how each start ends.

Usage: python tests/helpers/start_fuzz.py CASES [SEED]     prints the table of endings

A start ends in a run; in one line and status 2 (input) or 1 (run time); in 75 or 130 after a signal; never in a
traceback, an abort, a segmentation fault, or not at all. What can be known before TensorFlow is loaded is refused
before it: each start is first made in a process in which an import of TensorFlow ends it (start_server.py).
"""

import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.helpers.cifar_copies import BINARY_10, PYTHON_10, small_copy  # noqa: E402

BEGUN = "begun "

PLAIN = ("--dataset", "synthetic", "--depth", "8", "--batch-size", "32", "--epochs", "2", "--precision", "float32",
         "--warmup", "0s", "--name", "run", "--run-dir", "runs")  # fmt: skip
#: Of the images of a CIFAR copy in a file; five files train.
IMAGES_PER_FILE = 16
NOBODY = 1000
PATIENCE = 90.0
#: One case of so many is also started as a shell does, where another user need not read this Python.
REAL = 20
#: Variables of a locale, by whether it knows ASCII alone.
LOCALES = {False: {"LC_ALL": "C.UTF-8"}, True: {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}}
#: What cannot be known before TensorFlow is loaded, or before all the data is read.
LATE = (
    r"no checkpoint in .* can be used", r"--resume .*", r".*training images; use at most",
    r".*(data_batch|test_batch|batches\.meta|python\.tar\.gz).*",
    r"--run-dir .*: cannot be written", r"SLURM gave",
    r"--run-dir .*(Permission denied|Operation not permitted|Not a directory|File exists|No such file)",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One start. Paths are below its own folder: home/, runs/ and data/; its fields are as the shell would set them."""

    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str | None], ...] = ()
    ascii: bool = False
    #: What runs/run holds before: nothing, a run that was stopped, or a complete one.
    before: str = "nothing"
    #: The layout of a CIFAR copy in data/, which is then trained on.
    data: str | None = None
    #: Files that are not as they were: a path, and a word of ``harm`` or what it holds instead.
    files: tuple[tuple[str, str | bytes], ...] = ()
    #: Permissions; with them, and with ``nobody``, the user is not root.
    modes: tuple[tuple[str, int], ...] = ()
    nobody: bool = False
    umask: int = 0o022
    limits: tuple[tuple[str, int], ...] = ()
    stdin: str = "/dev/null"
    stdout: str = "read"
    stderr: str = "read"
    cwd_is_gone: bool = False
    ignored: tuple[str, ...] = ()
    #: Signals and the seconds after which they come, the second counted from the first.
    signals: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(PLAIN_CASE, k)}
        return f"Case({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


PLAIN_CASE = Case()

# What is drawn ------------------------------------------------------------------------------------------------------

#: No paths from the root, where a start of root would write.
_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda text: not text.startswith("/")
)
_LENGTHS = st.sampled_from(["0s", "1s", "1e", "50%", "100%", "2e", "3e", "0%", "-1e", "nan%", "1e9s", "inf", "1.5s"])
_NUMBERS = st.sampled_from(["0", "1", "2", "-1", "0.5", "1e39", "1e-45", "nan", "inf", "9" * 30, "x", ""])


def _flag(name: str, values: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return values.map(lambda value: (name, value))


#: Flags with which the plain run is still one.
_GOOD_FLAGS = st.one_of(
    _flag("--optimizer", st.sampled_from(["sgd", "muon", "adam"])),
    _flag("--precision", st.sampled_from(["auto", "bfloat16", "float16"])),
    _flag("--augment", st.sampled_from(["none", "standard", "shift"])),
    _flag("--exchange", st.sampled_from(["auto", "dense", "sparse"])),
    _flag("--save-every", st.sampled_from(["1s", "2e", "1m", "0.001m"])),
    _flag("--sparsity", st.sampled_from(["0", "0.5", "0.9", "0.998", "0.99999"])),
    _flag("--ema", st.sampled_from(["0", "0.9"])),
    _flag("--seed", st.sampled_from(["1", str(2**32 - 1)])),
    _flag("--batch-size", st.sampled_from(["1", "7", "64"])),
    _flag(
        "--run-dir", st.sampled_from(["runs/deeper", "~/runs", "r\N{LATIN SMALL LETTER E WITH ACUTE}", "a:b", "a b"])
    ),
    _flag("--name", st.sampled_from(["n" * 255, "other", "..a".strip("."), "_"])),
    st.sampled_from([("--deterministic",), ("--no-deterministic",), ("--resume", "never"), ("--strict-save",)]),
)
_ANY_FLAGS = st.one_of(
    _flag("--depth", st.sampled_from(["9", "2", "-4", "1202", "8.0", "566"])),
    *(_flag(name, _LENGTHS) for name in ("--prune-begin", "--prune-end", "--prune-frequency", "--warmup")),
    *(_flag(name, _NUMBERS) for name in ("--epochs", "--batch-size", "--base-lr", "--weight-decay", "--sparsity",
                                         "--initial-sparsity", "--keep", "--seed", "--expect-ranks", "--ema",
                                         "--label-smoothing")),
    *(_flag(name, _TEXT) for name in ("--name", "--run-dir", "--data-dir", "--resume", "--dataset", "--lr-drops")),
    _flag("--run-dir", st.sampled_from(["/proc/none", "/dev/null", "/sys/none", "~none-such", "d/" * 2100, "n" * 256])),
    _flag("--name", st.sampled_from(["n" * 256, ".", "..", "a/b", ""])),
    _flag("--preset", st.sampled_from(["study-baseline", "demo", "dmo"])),
    _flag("--save-every", _LENGTHS),
    _TEXT.map(lambda text: (text,)),
    st.just(("--help",)),
)  # fmt: skip

_GOOD_VARIABLES = st.sampled_from([
    ("HOME", None), ("HOME", ""), ("HOME", "/proc/nowhere"), ("TMPDIR", "/proc/nowhere"), ("PATH", None), ("PATH", ""),
    ("TERM", None), ("TERM", "dumb"), ("FORCE_COLOR", "1"), ("NO_COLOR", "1"), ("COLUMNS", "0"), ("COLUMNS", "x"),
    ("LINES", "-1"), ("TZ", "Nowhere/None"), ("TZ", ":/dev/null"), ("LANG", "xx_YY.nothing"), ("LC_TIME", "tr_TR"),
    ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("CUDA_VISIBLE_DEVICES", "x"),
    ("OMP_NUM_THREADS", "0"), ("OMP_NUM_THREADS", "x"), ("OMP_NUM_THREADS", ""), ("TF_NUM_INTRAOP_THREADS", "2"),
    ("TF_NUM_INTRAOP_THREADS", "0"), ("TF_CPP_MIN_LOG_LEVEL", "x"), ("TF_DETERMINISTIC_OPS", "2"),
    ("TF_GPU_ALLOCATOR", "none"), ("SLURM_PROCID", "0"), ("SLURM_CPUS_PER_TASK", "x"), ("SLURM_JOB_ID", "7"),
    ("SLURM_CPUS_PER_TASK", "0"), ("SLURM_STEP_ID", "0"), ("RANK", "0"), ("WORLD_SIZE", "4"), ("HOROVOD_TIMELINE", ""),
    ("HOROVOD_HOSTNAME", "x"), ("CNNOPT_DATA_DIR", "/proc/nowhere"), ("PYTHONSAFEPATH", "1"), ("PYTHONUNBUFFERED", "1"),
    ("HOROVOD_LOG_LEVEL", "nonsense"), ("no\N{LATIN SMALL LETTER E WITH ACUTE}", "\udcff"), ("KERAS_BACKEND", "torch"),
    ("HOROVOD_CYCLE_TIME", "x"), ("HOROVOD_GLOO_IFACE", "lo"), ("HTTP_PROXY", "x"), ("DISPLAY", ":9"),
    ("MPLBACKEND", "nonsense"), ("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python"), ("OPENBLAS_NUM_THREADS", "x"),
])  # fmt: skip
_LAUNCHERS_NAMES = (
    "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_RANK",
    "HOROVOD_CROSS_SIZE",
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "RANK", "WORLD_SIZE", "LOCAL_RANK",
    "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE",
    "SLURMD_NODENAME", "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT",
)  # fmt: skip
_SETTINGS_NAMES = ("HOROVOD_STALL_CHECK_TIME_SECONDS", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS",
                   "HOROVOD_FUSION_THRESHOLD", "TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS",
                   "TF_DETERMINISTIC_ORDER", "SLURM_GPUS_ON_NODE")  # fmt: skip
_ANY_VARIABLES = st.one_of(
    st.tuples(st.sampled_from(_LAUNCHERS_NAMES), st.sampled_from(["0", "1", "2", "", "x", "-1", "1(x2)", "127.0.0.1"])),
    st.tuples(
        st.sampled_from(_SETTINGS_NAMES),
        st.sampled_from(
            ["0", "1", "60", "", "5 min", "-1", "9" * 25, "1.5", "\N{SUPERSCRIPT TWO}", "99999", "9" * 5000]
        ),
    ),
    st.tuples(st.just("HOROVOD_GLOO_IFACE"), st.sampled_from(["none0", "", "x" * 20])),
)
_JSON = st.sampled_from([
    b"", b"{", b"{}", b"[]", b"null", b"7", b'{"identity": 1}', b'{"identity": {}}', b'{"identity": {"depth": 14}}',
    b'{"step": 4}', b'{"step": 2}', b'{"step": true}', b'{"step": 1e400}', b'{"step": -1}', b'{"step": 4, "line": 7}',
    b'{"step": ' + b"9" * 30 + b"}", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000, b"\0" * 4096, b"9" * 5000,
])  # fmt: skip
_CHECKPOINTS = ("checkpoints/step-00000004", "checkpoints/step-00000002")
_FILES = st.one_of(
    st.tuples(
        st.sampled_from(["config.json", "metrics.jsonl", "result.json", "env.json", "checkpoints", "tb", "tb/train",
                         ".lock", "."] + [f"{folder}/{name}" for folder in _CHECKPOINTS
                                     for name in ("", "state.json", "manifest.json", "arrays.npz")]),
        st.sampled_from(["missing", "empty", "cut", "flip", "folder", "fifo", "loop", "dangling"]),
    ).map(lambda drawn: (f"runs/run/{drawn[0]}", drawn[1])),
    st.tuples(st.sampled_from(["config.json", "metrics.jsonl", "result.json", "checkpoints/step-00000004/state.json",
                               "checkpoints/step-00000004/manifest.json"]),
              _JSON | st.binary(max_size=40)).map(lambda drawn: (f"runs/run/{drawn[0]}", drawn[1])),
    st.tuples(st.sampled_from(["home/.keras/keras.json", "home/.netrc"]), _JSON),
)  # fmt: skip
_HARM = ["missing", "empty", "cut", "flip", "folder", "fifo", "loop", "dangling", b"garbage" * 99]
_DATA_FILES = {
    "python": [f"data/{PYTHON_10.folder}/{name}" for name in ("data_batch_2", "test_batch", "batches.meta")],
    "binary": [
        f"data/{BINARY_10.folder}/{name}" for name in ("data_batch_3.bin", "test_batch.bin", "batches.meta.txt")
    ],
    "archive": [f"data/{PYTHON_10.archive}"],
}
_PLACES = ("runs", "runs/run", "runs/run/config.json", "runs/run/metrics.jsonl", "runs/run/result.json",
           "runs/run/checkpoints", "runs/run/checkpoints/step-00000002", "runs/run/tb", "data", "home",
           ".")  # fmt: skip
_LIMITS = st.one_of(
    st.tuples(st.just("RLIMIT_NOFILE"), st.sampled_from([8, 24, 64, 127, 128, 256])),
    st.tuples(st.just("RLIMIT_FSIZE"), st.sampled_from([0, 100, 1_000, 5_000, 100_000, 1_000_000])),
    st.tuples(st.just("RLIMIT_AS"), st.sampled_from([2**30, 2**31, 2**34])),
    # Of all threads of a user. Other cases have the same user, so no limit is close to what a run needs.
    st.tuples(st.just("RLIMIT_NPROC"), st.sampled_from([0, 1, 2, 8, 4096])),
    st.tuples(st.just("RLIMIT_STACK"), st.sampled_from([2**17, 2**18, 2**20, 2**23, 2**30])),
    st.tuples(st.just("RLIMIT_MEMLOCK"), st.just(0)),
    st.tuples(st.just("RLIMIT_MSGQUEUE"), st.just(0)),
)
_SIGNALS = st.tuples(
    st.sampled_from(["SIGTERM", "SIGUSR1", "SIGINT"]), st.floats(0.1, 4).map(lambda seconds: round(seconds, 2))
)


_KINDS = ("nothing", "flags", "environment", "locale", "before", "streams", "signal", "data", "place", "modes",
          "limits")  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One start: of few things that are not as usual, one may be of those that no run survives."""
    change: dict[str, Any] = {"flags": (), "environment": (), "files": (), "modes": (), "limits": ()}
    for kind in draw(st.lists(st.sampled_from(_KINDS), min_size=1, max_size=3, unique=True)):
        bad = draw(st.booleans())
        if kind == "flags":
            change["flags"] = draw(_ANY_FLAGS if bad else _GOOD_FLAGS)
        elif kind == "environment":
            some = st.lists(
                _ANY_VARIABLES if bad else _GOOD_VARIABLES, min_size=1, max_size=3, unique_by=lambda v: v[0]
            )
            change["environment"] = tuple(draw(some))
        elif kind == "locale":
            change["ascii"] = True
        elif kind == "before":
            change["before"] = draw(st.sampled_from(["stopped", "stopped", "complete"]))
            if bad:
                change["files"] += (draw(_FILES),)
        elif kind == "streams":
            name = draw(st.sampled_from(["stdin", "stdout", "stderr"]))
            change[name] = draw(st.sampled_from(["closed"] if name == "stdin" else ["closed", "gone", "/dev/full"]))
        elif kind == "signal":
            change["signals"] = tuple(draw(st.lists(_SIGNALS, min_size=1, max_size=2)))
        elif kind == "data":
            change["data"] = draw(st.sampled_from(list(_DATA_FILES)))
            if bad:
                path = draw(st.sampled_from(_DATA_FILES[change["data"]]))
                change["files"] += ((path, draw(st.sampled_from(_HARM))),)
        elif kind == "place":
            change |= draw(st.sampled_from([{"cwd_is_gone": True}, {"umask": 0o777}, {"umask": 0}, {"nobody": True},
                                            {"ignored": ("SIGINT",)}, {"ignored": ("SIGCHLD",)},
                                            {"ignored": ("SIGTERM", "SIGPIPE", "SIGHUP")}]))  # fmt: skip
        elif kind == "modes":
            where, mode = st.sampled_from(_PLACES), st.sampled_from([0, 0o100, 0o400, 0o500, 0o600])
            change["nobody"] = True
            change["modes"] = (draw(st.tuples(where, mode)),) if bad else ()
        elif kind == "limits":
            change["limits"] = (draw(_LIMITS),)
            # The kernel does not count root's threads.
            change |= {"nobody": True} if change["limits"][0][0] == "RLIMIT_NPROC" else {}
    return Case(**change)


def draw_cases(count: int, seed: int | None) -> list[Case]:
    """As many cases, the same each time where there is no seed."""
    drawn: dict[Case, None] = {}

    # Hypothesis comes back to small ones, and many draws make the same case.
    @hypothesis.settings(
        max_examples=4 * count, derandomize=seed is None, database=None, deadline=None,
        phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(cases())
    def collect(case: Case) -> None:
        if len(drawn) < count:
            drawn[case] = None

    (collect if seed is None else hypothesis.seed(seed)(collect))()
    return list(drawn)


# A start ------------------------------------------------------------------------------------------------------------


@dataclass
class End:
    """How a start ended: its exit status (negative: by that signal), None where it did not, and what it said."""

    status: int | None
    stdout: str
    stderr: str
    report: str
    seconds: float


def harm(path: Path, how: str | bytes) -> None:
    """Do to a file what happens to files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    match how:
        case "missing":
            pass
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "loop" | "dangling":
            path.symlink_to(path.name if how == "loop" else "nowhere")
        case "flip":
            middle = len(before) // 2
            path.write_bytes(
                before[:middle] + bytes([b ^ 0x55 for b in before[middle : middle + 1]]) + before[middle + 1 :]
            )
        case "empty" | "cut":
            path.write_bytes(before[: len(before) // 2] if how == "cut" else b"")
        case _:
            path.write_bytes(how)  # type: ignore[arg-type]


class Starts:
    """Makes starts in folders of their own, forked from servers that are started as they are needed."""

    def __init__(self) -> None:
        # Not pytest's, which only this user may enter.
        self.folder = folder = Path(tempfile.mkdtemp(prefix="starts-"))
        self.numbers = itertools.count()
        self.servers: dict[tuple[str, bool], subprocess.Popen] = {}
        self.lock = threading.Lock()
        folder.chmod(0o755)
        templates = folder / "templates"
        for kind, copy in (("python", PYTHON_10), ("binary", BINARY_10)):
            small_copy(copy, IMAGES_PER_FILE).folder(templates / kind / "data")
        (templates / "archive/data").mkdir(parents=True)
        small_copy(PYTHON_10, IMAGES_PER_FILE).archive(templates / "archive/data")

    def __enter__(self) -> "Starts":
        try:
            place = self.folder / "templates/first"
            end = self._make(PLAIN_CASE, "loaded", place)
            assert end.status == 0, end
            complete, stopped = (self.folder / "templates" / name for name in ("complete", "stopped"))
            for run in (complete, stopped):
                shutil.copytree(place / "runs", run / "runs")
            (stopped / "runs/run/result.json").unlink()
            shutil.rmtree(stopped / "runs/run/checkpoints/step-00000004")
            lines = (stopped / "runs/run/metrics.jsonl").read_text().splitlines(keepends=True)
            (stopped / "runs/run/metrics.jsonl").write_text("".join(lines[:-1]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers.values():
            assert server.stdin
            assert server.stdout
            server.stdin.close()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
            server.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, server: str, ascii: bool, question: Any) -> int:
        with self.lock:
            process = self.servers.get((server, ascii))
            if process is None:
                process = self.servers[server, ascii] = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("start_server.py")), server],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    env={**os.environ, **LOCALES[ascii], "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"},
                )  # fmt: skip
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                # The next start gets another one.
                del self.servers[server, ascii]
        assert answer, f"the {server} server has ended: {process.wait(30)}"
        return json.loads(answer)

    def prepare(self, case: Case, place: Path) -> None:
        """The folder of a start, as ``case`` has it."""
        for name in ("home", "runs", "cwd"):
            (place / name).mkdir(parents=True)
        for template in (case.before, case.data):
            if template not in (None, "nothing"):
                shutil.copytree(self.folder / "templates" / template, place, dirs_exist_ok=True)
        for path, how in case.files:
            harm(place / path, how)
        if case.nobody and os.getuid() == 0:
            for path in [place, *place.rglob("*")]:
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        for path, mode in case.modes:
            if (place / path).exists():
                (place / path).chmod(mode)

    def make(self, case: Case, server: str, *, real: bool = False) -> End:
        """One start in a new folder, and its end."""
        place = self.folder / str(next(self.numbers))
        try:
            return self._make(case, server, place, real=real)
        finally:
            for folder in (place, place.with_name(f"{place.name}-streams")):
                shutil.rmtree(folder, ignore_errors=True)

    def _make(self, case: Case, server: str, place: Path, *, real: bool = False) -> End:
        self.prepare(case, place)
        outside = place.with_name(f"{place.name}-streams")
        outside.mkdir()
        readers: dict[str, int] = {}
        streams = [case.stdin]
        # No files, which a case may limit.
        for name, kind in (("stdout", case.stdout), ("stderr", case.stderr), ("report", "read")):
            if kind == "read":
                os.mkfifo(outside / name)
                readers[name] = os.open(outside / name, os.O_RDONLY | os.O_NONBLOCK)
                kind = str(outside / name)
            streams.append(kind)
        # Only what is needed, so that a case is the same on every machine.
        environment = {"HOME": str(place / "home"), "PATH": os.environ["PATH"], "TERM": "xterm"}
        environment |= LOCALES[case.ascii]
        for variable, value in case.environment:
            environment.pop(variable, None)
            if value is not None:
                environment[variable] = value
        flags = list(PLAIN)
        if case.data:
            flags[1:2] = ["cifar10", "--data-dir", "data"]
        if case.cwd_is_gone:
            flags = [str(place / flag) if flag in ("runs", "data") else flag for flag in flags]
        start = {
            "argv": [*flags, *case.flags], "environment": environment, "streams": streams[:3], "umask": case.umask,
            "cwd": str(place / "cwd" if case.cwd_is_gone else place), "cwd_is_gone": case.cwd_is_gone, "real": real,
            "limits": case.limits, "uid": NOBODY if case.nobody and os.getuid() == 0 else None,
            "ignored": case.ignored, "report": streams[3],
        }  # fmt: skip
        begun = time.monotonic()
        pid = self._ask(server, case.ascii, start)
        process = os.pidfd_open(pid)
        said = dict.fromkeys(("stdout", "stderr", "report"), b"")
        pending = list(case.signals)
        due = None
        killed = False
        while not select.select([process], [], [], 0.03)[0]:
            now = time.monotonic()
            if due is None and pending and said["report"]:
                due = now + pending[0][1]
            if due is not None and now >= due:
                signal.pidfd_send_signal(process, getattr(signal, pending.pop(0)[0]))
                due = now + pending[0][1] if pending else None
            if now - begun > PATIENCE:
                killed = True
                signal.pidfd_send_signal(process, signal.SIGKILL)
            for name, reader in readers.items():
                said[name] += _read(reader)
        status = os.waitstatus_to_exitcode(self._ask(server, case.ascii, pid))
        os.close(process)
        for name, reader in readers.items():
            said[name] += _read(reader)
            os.close(reader)
        texts = {name: text.decode(errors="replace") for name, text in said.items()}
        return End(None if killed else status, **texts, seconds=time.monotonic() - begun)


def _read(reader: int) -> bytes:
    data = b""
    with contextlib.suppress(BlockingIOError):
        while part := os.read(reader, 1 << 16):
            data += part
    return data


# What it came to ----------------------------------------------------------------------------------------------------


def wrong_with(case: Case, end: End, *, loaded: bool) -> str | None:
    """What is wrong with how a start ended."""
    if end.status is None:
        return f"it had not ended after {PATIENCE:.0f} s"
    if end.status < 0:
        return f"{signal.Signals(-end.status).name} ended it"
    if "Traceback" in end.stderr + end.stdout:
        return "it left a traceback"
    if end.status in (75, 130):
        names = {name for name, _ in case.signals}
        expected = 130 if "SIGINT" in names else 75
        return (
            None if names and (end.status == expected or len(names) > 1) else f"status {end.status} without its signal"
        )
    if end.status not in (0, 1, 2):
        return f"status {end.status}"
    lines = end.stderr.splitlines()
    if end.status and case.stderr == "read":
        rank = dict(case.environment)
        other = any((rank.get(name) or "0") != "0" for name in _LAUNCHERS_NAMES if name.endswith(("RANK", "PROCID")))
        if not (len(lines) == 1 and lines[0].startswith("train_hvd.py: ")) and not (other and not lines):
            return f"{len(lines)} lines on standard error"
    if end.status == 0 and lines:
        return "it went well, but something is on standard error"
    if (
        end.status == 2
        and loaded
        and case.stderr == "read"
        and not any(re.match(f"train_hvd.py: {late}", end.stderr) for late in LATE)
    ):
        return "it was refused after TensorFlow was loaded"
    return None


ENDINGS = {0: "a run", 1: "one line and 1", 2: "one line and 2", 75: "75 after a signal", 130: "130 after a signal"}


@dataclass
class Tally:
    """What the table is made of."""

    endings: Counter = field(default_factory=Counter)
    trained: int = 0
    early: int = 0
    real: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """Starts by case; those made again as a shell does count once."""
        return sum(self.endings.values())

    def __str__(self) -> str:
        rows = {
            **{name: self.endings[name] for name in sorted(self.endings)},
            "cases": self.cases,
            "of these that trained": self.trained,
            "of these that ended before TensorFlow was loaded": self.early,
            "of these also started by a shell's means": self.real,
            "wrong": len(self.wrong),
        }
        return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


@dataclass
class Tried:
    """A case and how it ended."""

    case: Case
    end: End
    #: Whether TensorFlow was needed.
    loaded: bool
    real: bool
    wrong: str | None

    @property
    def trained(self) -> bool:
        """Whether it took a step."""
        stopped = self.end.status in (75, 130) and "saved" in self.end.stdout
        return self.loaded and (self.end.status == 0 or "epoch " in self.end.stdout or stopped)

    def __str__(self) -> str:
        said = self.end.stderr[-3000:].rstrip()
        return f"{self.case}\n    {self.wrong}: status {self.end.status} after {self.end.seconds:.1f} s; {said}"


def try_case(starts: Starts, case: Case, *, real: bool = False) -> Tried:
    """Start a case, again with TensorFlow where it gets so far, and, if ``real``, again as a shell does."""
    end, loaded = starts.make(case, "bare"), False
    if end.report.removeprefix(BEGUN):
        end, loaded = starts.make(case, "loaded"), True
    wrong = wrong_with(case, end, loaded=loaded)
    if real and not wrong:
        forked, end = end.status, starts.make(case, "bare", real=True)
        wrong = wrong_with(case, end, loaded=loaded)
        if not wrong and end.status != forked and not case.limits:
            wrong = f"it ended with {forked} where it was forked"
    return Tried(case, end, loaded, real, wrong)


def fuzz(starts: Starts, all_cases: Sequence[Case], say: Callable[[object], None] = print) -> Tally:
    """Try all cases, two at a time; ``say`` hears of each that ends wrongly as it does, and how far it has come."""
    tally = Tally()

    def one(numbered: tuple[int, Case]) -> Tried:
        number, case = numbered
        real = number % REAL == 0 and case.before != "stopped" and not case.nobody and not case.signals
        if real and case.before == "nothing":
            # Synthetic images of a forked start are fewer.
            case = replace(case, data=case.data or "binary")
        try:
            return try_case(starts, case, real=real)
        except Exception:
            # A start that this program cannot judge is a failure too, and the others go on.
            nothing = End(None, "", traceback.format_exc(), "", 0.0)
            return Tried(case, nothing, loaded=False, real=False, wrong="the fuzz itself failed")

    with ThreadPoolExecutor(2) as pool:
        for tried in pool.map(one, enumerate(all_cases)):
            tally.endings["wrong" if tried.wrong else ENDINGS[tried.end.status or 0]] += 1
            tally.trained += tried.trained
            tally.early += not tried.loaded
            tally.real += tried.real
            if tried.wrong:
                tally.wrong.append(str(tried))
                say(tried)
            if tally.cases % 100 == 0:
                say(f"{tally.cases} of {len(all_cases)} starts, {len(tally.wrong)} wrong")
    return tally


def main() -> int:
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 10**6
    print(f"{count} starts, seed {seed}", flush=True)
    with Starts() as starts:
        tally = fuzz(starts, draw_cases(count, seed), lambda said: print(said, flush=True))
    print("\n".join(["", *tally.wrong, str(tally)]), flush=True)
    return bool(tally.wrong)


if __name__ == "__main__":
    sys.exit(main())
