"""One rank with a made-up GPU.

Usage: horovodrun -np 2 python gpu_worker.py DRIVER share|alone GPU_OF_RANK_0 GPU_OF_RANK_1
"""

import os
import sys

from cnnopt.distributed import collectives, entrypoint, gpus
from cnnopt.distributed.world import launched

driver, share, *numbers = sys.argv[1:]


def train(request, peers) -> int:
    collectives.prepare(launched()[0], verbose=False)
    world = collectives.start(verbose=False)
    collectives.exchange_addresses(peers)
    # From here on this rank sees one GPU only, as a task of SLURM does.
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers[world.rank]
    collectives.check_gpus(gpus.identity(0, driver), share=share == "share")
    print(f"rank {world.rank} goes on", flush=True)
    collectives.shutdown()
    return 0


if __name__ == "__main__":
    entrypoint.start(lambda: entrypoint.run("gpu_worker.py", train))
