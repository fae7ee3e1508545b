"""One rank of PyTorch's DistributedDataParallel over gloo: channels_last, the same network and SGD.

Usage: python ddp.py DEPTH BATCH_A_RANK PRECISION; needs PyTorch (dependency group ``peers``), and PEER_ADDRESSES, the
first of which is the first rank's.
Request: {"steps": 10}
"""

import contextlib
import os
import sys
import time

import torch
import torch.distributed
from side_by_side import serve
from torch import nn
from torch.nn import functional
from torch_network import resnet

depth, batch, precision = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
# Without the variable it is 1, as torchrun gives each of several ranks.
torch.set_num_threads(int(os.environ.get("TF_NUM_INTRAOP_THREADS", "1")))
torch.distributed.init_process_group(
    "gloo", init_method=f"tcp://{os.environ['PEER_ADDRESSES'].split(',')[0]}", rank=int(os.environ["HOROVOD_RANK"]),
    world_size=int(os.environ["HOROVOD_SIZE"]),
)  # fmt: skip
model = nn.parallel.DistributedDataParallel(resnet(depth))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
# One resident batch: the other trainers pay for no input pipeline, while our ranks read and augment images.
images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
labels = torch.randint(10, (batch,))


def block(steps: int) -> dict:
    """``steps`` steps of training."""
    torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        half = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
        with half:
            loss = functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    loss.item()
    return {"seconds": time.perf_counter() - start, "compute": precision}


serve(block)
