"""``python -m cnnopt.report`` is now ``python -m cnnopt.compare``. This file only says so, and cannot be imported."""

import sys

MOVED = "cnnopt.report is now cnnopt.compare: run python -m cnnopt.compare with the same arguments"

if __name__ != "__main__":
    raise ImportError(MOVED, name=__name__)
print(MOVED, file=sys.stderr)
sys.exit(2)
