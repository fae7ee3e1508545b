"""PyTorch in one process, on a GPU or on CPUs: channels_last, autocast, SGD, one resident batch.

Usage: python torch_gpu.py DEPTH BATCH PRECISION eager|compile|graph
Request: {"steps": 10}

``graph`` replays a whole step as one CUDA graph. Its loss is not scaled, because a graph cannot skip a step.
"""

import resource
import sys
import time
from collections.abc import Callable

import torch
from side_by_side import serve
from torch.nn import functional
from torch_network import resnet

depth, batch, precision, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = precision != "float32"
torch.backends.cudnn.benchmark = True
# TensorFlow's float32 uses TF32 on tensor cores too.
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = True

network = resnet(depth, DEVICE)
forward = torch.compile(network) if mode == "compile" else network
optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
scaler = torch.amp.GradScaler(DEVICE, enabled=precision == "float16" and mode != "graph")
images = torch.randn(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
labels = torch.randint(10, (batch,), device=DEVICE)


def step(*, capturing: bool = False) -> None:
    """One update. ``capturing``: there are no gradients to forget."""
    with torch.autocast(DEVICE, getattr(torch, precision) if HALF else None, enabled=HALF):
        loss = functional.cross_entropy(forward(images).float(), labels)
    if not capturing:
        optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def captured() -> Callable[[], None]:
    """A function that replays ``step``. PyTorch asks for some steps on another stream first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(11):
            step()
    torch.cuda.current_stream().wait_stream(side)
    # Without gradients to add to, the captured backward pass makes new ones, and each replay overwrites them.
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(capturing=True)
    return graph.replay


run: Callable[[], None] | None = None


def block(steps: int) -> dict:
    """Do ``steps`` steps. The first block also makes the graph."""
    global run
    start = time.perf_counter()
    if run is None:
        run = captured() if mode == "graph" else step
    for _ in range(steps):
        run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak, "version": torch.__version__}


serve(block)
