"""The layers and weights of the CIFAR ResNet, He et al. 2016, section 4.2: their names, shapes and stages.

``cnnopt.model.resnet`` builds the network from this module. The module uses the standard library only: a checkpoint can
be checked, and a bucket of gradients named, without building the network.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Channels of each stage.
FILTERS = (16, 32, 64)


@dataclass(frozen=True)
class Block:
    """A residual block: two convolutions and the shortcut around them."""

    stage: int
    number: int

    @property
    def name(self) -> str:
        """The prefix of the names of its layers."""
        return f"stage{self.stage}_block{self.number}"

    @property
    def filters(self) -> int:
        """The number of output channels."""
        return FILTERS[self.stage - 1]

    @property
    def downsamples(self) -> bool:
        """True if the block halves height and width, and doubles the channels."""
        return self.stage > 1 and self.number == 1


def blocks(depth: int) -> list[Block]:
    """The blocks of a ``depth``-layer network, in order of computation. Raises ValueError if ``depth`` is not 6n+2."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth {depth} is not 6n+2")
    stages, each = range(1, len(FILTERS) + 1), range(1, (depth - 2) // 6 + 1)
    return [Block(stage, number) for stage in stages for number in each]


def layer_names(depth: int) -> list[str]:
    """The names of the layers that have a kernel, in the order of computation."""
    convolutions = [f"{block.name}_conv{i}" for block in blocks(depth) for i in (1, 2)]
    return ["stem", *convolutions, "classifier"]


def weight_shapes(depth: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, except ``mean:0`` and ``std:0``, whose shapes depend on the run (``Standardize``)."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    *convolutions, classifier = layer_names(depth)
    for layer in convolutions:
        filters = FILTERS[stage_of(layer) - 1]
        shapes[f"{layer}/kernel:0"] = (3, 3, channels, filters)
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[f"{layer}_bn/{name}:0"] = (filters,)
        channels = filters
    return {**shapes, f"{classifier}/kernel:0": (channels, num_classes), f"{classifier}/bias:0": (num_classes,)}


def stage_of(name: str) -> int:
    """The stage of a layer or a weight, counted from 1. The stem is in the first stage, the classifier in the last."""
    if name.startswith("stem"):
        return 1
    if name.startswith("classifier"):
        return len(FILTERS)
    return int(name.removeprefix("stage").partition("_")[0])
