"""Forks starts of train_hvd.py from one process, so that a start costs no import (start_fuzz.py).

Usage: python start_server.py bare|loaded

A `bare` process has not imported TensorFlow, and neither may its starts: one that is about to says so in its report,
and ends. A `loaded` one has imported all that a run imports. Reads a start as JSON per line, and answers with its pid;
a pid is answered with the wait status of that start, once it has ended.
"""

import codecs
import ctypes
import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

PROGRAM = Path(__file__).parents[2] / "train_hvd.py"
sys.path.insert(0, str(PROGRAM.parent))
#: What a start must not load before it has refused what can be known without.
HEAVY = {"tensorflow", "tf_keras", "keras", "horovod", "sklearn", "tensorflow_model_optimization"}
#: Training and test images of a forked start's synthetic data, and the images that test_start.py's CIFAR copies have.
SIZES = (64, 32)

import train_hvd  # noqa: E402
from cnnopt.data import datasets  # noqa: E402
from cnnopt.distributed import entrypoint, host  # noqa: E402
from cnnopt.distributed.signals import StopRequest  # noqa: E402
from cnnopt.run import checkpoint, run_folder  # noqa: E402, F401

# A start under another user may be unable to read Python's own folder.
codecs.lookup("ascii")


class Tripwire:
    """An import hook that ends the process in the place of an import of TensorFlow, Horovod or scikit-learn."""

    def __init__(self, report: int) -> None:
        self.report = report

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in HEAVY:
            assert HEAVY.isdisjoint(sys.modules)
            os.write(self.report, name.encode())
            os._exit(0)


def load() -> None:
    """Import what a run imports."""
    os.environ.update(TF_USE_LEGACY_KERAS="1", TF_ENABLE_ONEDNN_OPTS="1", TF_CPP_MIN_LOG_LEVEL="3")
    os.environ["KERAS_HOME"] = os.devnull
    with host.quiet_stderr():
        import tensorflow as tf
        import tf_keras

        sys.modules["keras"] = tf_keras
        import filelock  # noqa: F401
        import horovod.tensorflow.keras  # noqa: F401

        from cnnopt.training import callbacks, console, loop, metrics, resume, session, step  # noqa: F401

    tf.get_logger().setLevel("ERROR")
    # Graphs as small as these are run sooner than they are optimized.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def stream(kind: str, number: int) -> None:
    """Make ``kind`` the file descriptor: the path of a file or FIFO, or what nobody reads."""
    if kind == "closed":
        os.close(number)
        if number:
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        return
    if kind == "gone":
        reader, given = os.pipe()
        os.close(reader)
    else:
        given = os.open(kind, os.O_WRONLY if number else os.O_RDONLY)
    os.dup2(given, number)
    os.close(given)


def native(text: str) -> str:
    """What Python makes in this locale of bytes that are ``text`` in UTF-8."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def become_start(start: dict[str, Any]) -> NoReturn:
    """Be what a shell, a batch system or a container makes of a process before the program begins."""
    report = os.open(start["report"], os.O_WRONLY)
    pr_set_pdeathsig = 1
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    for number, kind in enumerate(start["streams"]):
        stream(kind, number)
    os.environ.clear()
    os.environ.update({native(name): native(value) for name, value in start["environment"].items()})
    os.chdir(start["cwd"])
    if start["cwd_is_gone"]:
        os.rmdir(start["cwd"])
    for name in start["ignored"]:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.umask(start["umask"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, value in start["limits"]:
        resource.setrlimit(getattr(resource, name), (value, value))
    if start["uid"] is not None:
        os.setgroups([])
        os.setresgid(start["uid"], start["uid"], start["uid"])
        os.setresuid(start["uid"], start["uid"], start["uid"])
    # Cleared where the user changes, so this is last.
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    sys.argv = [str(PROGRAM), *map(native, start["argv"])]
    if start["real"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], dict(os.environ))
    if "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, Tripwire(report))
    listen = StopRequest.listen

    def listen_and_say_so(request: StopRequest) -> None:
        # Signals count from here: one that comes before the program listens to them is nobody's.
        listen(request)
        os.write(report, b"begun ")

    StopRequest.listen = listen_and_say_so  # type: ignore[method-assign]
    entrypoint.start(train_hvd.main)


def main() -> None:
    for late in ("cp437", "idna"):
        # Python imports them when a name in an archive, or of a host, is read, and a user other than root may not.
        codecs.lookup(late)
    if sys.argv[1] == "loaded":
        load()
    datasets.DATASETS["synthetic"] = SIZES[0]
    datasets.load.__kwdefaults__["synthetic_sizes"] = SIZES
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            answer = os.waitpid(asked, 0)[1]
        else:
            assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "threads must not be forked"
            sys.stdout.flush()
            if not (answer := os.fork()):
                become_start(asked)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
