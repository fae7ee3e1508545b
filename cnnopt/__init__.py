"""Train a pruned, mixed-precision CIFAR ResNet synchronously, and measure the gain."""

import sys

from cnnopt import interrupt

__version__ = "0.1.0"

# Python sets "-m" while it looks for the module of ``python -m cnnopt.predict``. No import of ours comes earlier.
if sys.argv[:1] == ["-m"] or "".join(sys.argv[:1]).endswith("train_hvd.py"):
    interrupt.end_at_once()
