"""Sets TensorFlow's variables as the program does, and starts TensorFlow once for the tests that need it."""

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest

from cnnopt.distributed import collectives
from cnnopt.distributed.world import World

#: What a user's shell has set, for tests that start the program.
SHELL = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

# Time limits of single examples fail on a busy machine and say nothing of the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# Test files import TensorFlow while pytest collects them.
SETTINGS = collectives.prepare(World(), verbose=False)


def pytest_collection_finish() -> None:
    """The tests of tests/parallel start programs from this process: they must choose their threads themselves."""
    for name in SETTINGS.keys() - SHELL.keys():
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def shell() -> dict[str, str]:
    """The environment without what this process has set for itself."""
    return dict(SHELL)


@pytest.fixture(scope="session", autouse=True)
def started() -> Iterator[None]:
    """Horovod and TensorFlow, before the first test, if any test file needs them."""
    if "tensorflow" in sys.modules:
        os.environ.update(SETTINGS)
        collectives.start(verbose=False)
    yield
    pytest_collection_finish()


@pytest.fixture(autouse=True)
def not_deterministic() -> Iterator[None]:
    """Whatever ``--deterministic`` a test has set in this process, the next one finds TensorFlow's default."""
    yield
    if "tensorflow" in sys.modules:
        from tensorflow.python.framework.config import disable_op_determinism

        disable_op_determinism()


@pytest.fixture
def float32_policy() -> Iterator[None]:
    """Whatever policy the test sets, the next one finds Keras' default."""
    import tf_keras as keras

    keras.mixed_precision.set_global_policy("float32")
    yield
    keras.mixed_precision.set_global_policy("float32")
