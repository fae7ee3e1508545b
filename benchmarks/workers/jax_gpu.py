"""JAX in one process, on a GPU or on CPUs: any number of steps in one compiled loop, SGD, images on the device.

Usage: python jax_gpu.py DEPTH BATCH PRECISION
Request: {"steps": 10}

Each step draws, crops and flips its images. The loss of float16 is not scaled.
"""

import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from side_by_side import serve

depth, batch, precision = int(sys.argv[1]), int(sys.argv[2]), jnp.dtype(sys.argv[3])
RNG = np.random.default_rng(0)
NUMBER, CLASSES = 2048, 10
Arrays = dict[str, Any]


def initial() -> Arrays:
    """Kernels, gains and biases of BatchNorm, and the classifier, float32."""
    found: Arrays = {}
    before = 3
    for name, filters, _ in convolutions():
        shape = (3, 3, before, filters)
        found[f"{name}/kernel"] = RNG.standard_normal(shape).astype(np.float32) * np.sqrt(2 / np.prod(shape[:3]))
        found[f"{name}/gamma"], found[f"{name}/beta"] = np.ones(filters, np.float32), np.zeros(filters, np.float32)
        before = filters
    found["classifier"] = RNG.standard_normal((64, CLASSES)).astype(np.float32) / 8
    return jax.tree.map(jnp.asarray, found)


def convolutions() -> list[tuple[str, int, int]]:
    """Name, filters and stride, in order. Every second one from the second on ends a block."""
    found = [("stem", 16, 1)]
    for stage, filters in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            found.append((f"{stage}.{block}.1", filters, 2 if stage and not block else 1))
            found.append((f"{stage}.{block}.2", filters, 1))
    return found


def normalized(weights: Arrays, x: jax.Array, name: str, stride: int) -> jax.Array:
    """Convolution and BatchNorm, which computes its statistics in float32."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    kernel = weights[f"{name}/kernel"].astype(precision)
    y = lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=dimensions)
    y = y.astype(jnp.float32)
    mean = y.mean((0, 1, 2))
    variance = jnp.maximum((y * y).mean((0, 1, 2)) - mean * mean, 0)
    y = (y - mean) * (weights[f"{name}/gamma"] * lax.rsqrt(variance + 1e-5)) + weights[f"{name}/beta"]
    return y.astype(precision)


def loss_of(weights: Arrays, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of images [batch, 32, 32, 3]."""
    (stem, _, stride), *rest = convolutions()
    x = jax.nn.relu(normalized(weights, x, stem, stride))
    for (first, filters, stride), (second, _, _) in zip(rest[::2], rest[1::2], strict=True):
        y = jax.nn.relu(normalized(weights, x, first, stride))
        y = normalized(weights, y, second, 1)
        if stride > 1:
            x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (filters // 4, filters // 4)))
        x = jax.nn.relu(x + y)
    logits = x.astype(jnp.float32).mean((1, 2)) @ weights["classifier"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def drawn(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A batch of random images, each cropped and half of them flipped."""
    which, places, mirrored = jax.random.split(key, 3)
    index = jax.random.randint(which, (batch,), 0, NUMBER)
    top, left = jax.random.randint(places, (2, batch, 1), 0, 9)
    side = jnp.arange(32)
    columns = left + jnp.where(jax.random.bernoulli(mirrored, 0.5, (batch, 1)), 31 - side, side)
    x = IMAGES[index[:, None, None], (top + side)[:, :, None], columns[:, None, :]]
    return ((x.astype(jnp.float32) - 120) / 64).astype(precision), LABELS[index]


def step(_: int, state: tuple[Arrays, Arrays, jax.Array]) -> tuple[Arrays, Arrays, jax.Array]:
    """One update with Nesterov momentum."""
    weights, momentum, key = state
    key, used = jax.random.split(key)
    gradients = jax.grad(loss_of)(weights, *drawn(used))
    gradients = jax.tree.map(lambda g, w: g + 5e-4 * w, gradients, weights)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradients)
    weights = jax.tree.map(lambda w, m, g: w - 1e-3 * (g + 0.9 * m), weights, momentum, gradients)
    return weights, momentum, key


IMAGES = jnp.asarray(RNG.integers(0, 256, (NUMBER, 40, 40, 3), np.uint8))
LABELS = jnp.asarray(RNG.integers(0, CLASSES, NUMBER))
# The number of steps is an argument, so one compilation serves every block.
run = jax.jit(lambda steps, state: lax.fori_loop(0, steps, step, state))
state = (initial(), jax.tree.map(jnp.zeros_like, initial()), jax.random.key(0))


def block(steps: int) -> dict:
    """Do ``steps`` steps in one call."""
    global state
    start = time.perf_counter()
    state = jax.block_until_ready(run(steps, state))
    seconds = time.perf_counter() - start
    of_device = jax.devices()[0].memory_stats() or {}
    peak = of_device.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"seconds": seconds, "peak_bytes": peak, "version": jax.__version__}


serve(block)
