"""Start real ranks, and end every process that a test started."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.helpers import ROOT

# Without --gloo, horovodrun imports TensorFlow three times before it starts a rank, to see how Horovod was built.
HOROVODRUN = (str(Path(sys.executable).with_name("horovodrun")), "--gloo", "-np", "{ranks}")


def assert_pruned(arrays: Mapping[str, np.ndarray], sparsity: float) -> None:
    """The eight kernels of a ResNet-8 together hold exactly the number of zeros that ``--sparsity`` asks for."""
    kernels = [array for name, array in arrays.items() if name.startswith("weights/") and name.endswith("kernel:0")]
    assert len(kernels) == 8
    size = sum(kernel.size for kernel in kernels)
    assert sum(int(np.sum(kernel == 0)) for kernel in kernels) == size - round(size * (1 - sparsity))


class Job:
    """One launcher in a separate process group, with its output in a file."""

    def __init__(self, launcher: list[str], command: list[str], log: Path) -> None:
        self.log = log
        # Four ranks on two cores: threads must not spin while they wait for each other.
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*launcher, sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait(self, timeout: float = 400) -> int:
        return self.process.wait(timeout)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 300) -> None:
        self.wait_until(lambda output: text in output, timeout)

    def wait_until(self, condition: Callable[[str], bool], timeout: float = 300) -> None:
        end = time.monotonic() + timeout
        while not condition(self.output()):
            assert time.monotonic() < end, self.output()
            assert self.process.poll() is None, self.output()
            time.sleep(0.2)

    def ranks(self) -> list[psutil.Process]:
        """The training processes, by rank."""
        found = {}
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                # horovodrun starts each rank in shells, which have the same environment as the rank.
                if "python" in process.name() and "horovodrun" not in " ".join(process.cmdline()):
                    found[int(process.environ().get("HOROVOD_RANK", -1))] = process
        return [found[rank] for rank in sorted(found) if rank >= 0]

    def _processes(self) -> Iterator[psutil.Process]:
        """The processes that the launcher has started, directly or not."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.pid != os.getpid() and process.environ().get("CNNOPT_TEST_JOB") == str(self.log):
                    yield process

    def end(self) -> None:
        """Kill the launcher, and all that it started, directly or not, even in other sessions."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """``start(ranks, *command)`` gives a running Job, by default of horovodrun. All jobs end with the module."""
    jobs = []

    def begin(ranks: int, *command: str, launcher: tuple[str, ...] = HOROVODRUN) -> Job:
        log = tmp_path_factory.mktemp("job") / "output.txt"
        os.environ["CNNOPT_TEST_JOB"] = str(log)
        jobs.append(Job([part.format(ranks=ranks) for part in launcher], list(command), log))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()
