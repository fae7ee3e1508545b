"""``python -m cnnopt.report`` has become ``python -m cnnopt.compare``: this says so, and is no module to import."""

import sys

MOVED = "cnnopt.report is now cnnopt.compare: run python -m cnnopt.compare with the same arguments"

if __name__ != "__main__":
    raise ImportError(MOVED, name=__name__)
print(MOVED, file=sys.stderr)
sys.exit(2)
