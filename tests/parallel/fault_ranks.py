"""Ranks forked from one process that has imported TensorFlow, so that a job of test_faults.py starts in seconds.

horovodrun and two imports of TensorFlow take 20 s a job; a fork takes almost none. The parent checks that it has no
other thread when it forks: TensorFlow and Horovod start theirs in the ranks. A rank is train_hvd.main() with a planted
fault, and with Horovod's variables in its environment as horovodrun sets them.

Reads a job {"argv", "environment": [per rank], "log", "events", "fault"} per line, and answers with the ranks' pids;
an empty line is answered with the wait status of each rank that has ended since.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.update(TF_USE_LEGACY_KERAS="1", TF_ENABLE_ONEDNN_OPTS="1", TF_CPP_MIN_LOG_LEVEL="3")
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import tensorflow as tf
import tf_keras

sys.modules["keras"] = tf_keras
import horovod.tensorflow.keras  # noqa: E402, F401

import train_hvd  # noqa: E402
from cnnopt.data import datasets  # noqa: E402, F401
from cnnopt.distributed import collectives, entrypoint  # noqa: E402
from cnnopt.run import checkpoint  # noqa: E402
from cnnopt.training import callbacks, console, loop, metrics, resume  # noqa: E402, F401


def strike(kind: str) -> None:
    """Do to this process what happens to processes."""
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "SIGUSR1": signal.SIGUSR1}.get(kind, signal.SIGTERM)
    os.kill(os.getpid(), number)
    if kind == "twice":
        time.sleep(0.02)
        os.kill(os.getpid(), number)


class FaultAtStep(tf_keras.callbacks.Callback):
    """Strikes some time after a step began; a hang takes the main thread alone."""

    def __init__(self, kind: str, step: int, delay: float) -> None:
        super().__init__()
        self.kind, self.step, self.delay = kind, step, delay

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if batch == self.step and self.kind == "hang":
            time.sleep(3600)
        elif batch == self.step:
            threading.Timer(self.delay, strike, [self.kind]).start()


class Tell(tf_keras.callbacks.Callback):
    """Steps done and checkpoints written, in a file that a killed process leaves behind."""

    def __init__(self, events: str) -> None:
        super().__init__()
        self.file = os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        save = checkpoint.save

        def save_and_tell(folder, step, *args, **settings):
            path = save(folder, step, *args, **settings)
            os.write(self.file, f"save {step}\n".encode())
            return path

        checkpoint.save = save_and_tell

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        os.write(self.file, f"step {batch + 1}\n".encode())


def plant(kind: str, where: str, at: float, delay: float) -> list[tf_keras.callbacks.Callback]:
    """Prepare this process to be struck: during start-up, at a step, or at one of the syncs of its saves."""
    if where == "step":
        return [FaultAtStep(kind, int(at), delay)]
    if where == "start":
        threading.Timer(at, strike, [kind]).start()
    if where == "save":
        sync, calls = checkpoint._sync, iter(range(1000))

        def sync_or_strike(path: Path) -> None:
            if next(calls) == at:
                strike(kind)
            sync(path)

        checkpoint._sync = sync_or_strike
    return []


def become_rank(job: dict, rank: int) -> NoReturn:
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    # With the process that it was forked from: also where it is stopped, or its test was given up.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["environment"][rank])
    # Graphs as small as these are run sooner than they are optimized.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    sys.argv = ["train_hvd.py", *job["argv"]]
    hooks = [Tell(job["events"])] if rank == 0 else []
    if (fault := dict(job["fault"])) and fault.pop("rank") == rank:
        hooks += plant(**fault)
    of_horovod = collectives.callbacks
    collectives.callbacks = lambda: [*of_horovod(), *hooks]
    entrypoint.leave(train_hvd.main())


def main() -> None:
    for line in sys.stdin:
        if line.strip():
            assert os.listdir("/proc/self/task") == [str(os.getpid())], "a process with threads must not be forked"
            job, pids = json.loads(line), []
            for rank in range(len(job["environment"])):
                sys.stdout.flush()
                if not (pid := os.fork()):
                    become_rank(job, rank)
                pids.append(pid)
            answer = pids
        else:
            answer = []
            while True:
                try:
                    ended = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if not ended[0]:
                    break
                answer.append(ended)
        print(json.dumps(answer), flush=True)


main()
