"""The layers and weights of the CIFAR ResNet, He et al. 2016, section 4.2: their names, shapes and stages.

``cnnopt.model.resnet`` builds the network from this. Standard library only, so that a checkpoint can be checked, and a
bucket of gradients named, without building it.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Channels of each stage.
FILTERS = (16, 32, 64)


@dataclass(frozen=True)
class Block:
    """Two convolutions and the shortcut around them."""

    stage: int
    number: int

    @property
    def name(self) -> str:
        """What the names of its layers begin with."""
        return f"stage{self.stage}_block{self.number}"

    @property
    def filters(self) -> int:
        """Channels of its output."""
        return FILTERS[self.stage - 1]

    @property
    def downsamples(self) -> bool:
        """Whether it halves height and width, and doubles the channels."""
        return self.stage > 1 and self.number == 1


def blocks(depth: int) -> list[Block]:
    """The blocks of a network of ``depth`` layers, in the order of computation. Raises ValueError."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth {depth} is not 6n+2")
    stages, each = range(1, len(FILTERS) + 1), range(1, (depth - 2) // 6 + 1)
    return [Block(stage, number) for stage in stages for number in each]


def layer_names(depth: int) -> list[str]:
    """The layers that have a kernel, in the order of computation."""
    convolutions = [f"{block.name}_conv{i}" for block in blocks(depth) for i in (1, 2)]
    return ["stem", *convolutions, "classifier"]


def weight_shapes(depth: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Shape of each weight, but for ``mean:0`` and ``std:0``, whose shape depends on the run (``Standardize``)."""
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
    """The stage, from 1, of a layer or of one of its weights; the stem's is the first, the classifier's the last."""
    if name.startswith("stem"):
        return 1
    if name.startswith("classifier"):
        return len(FILTERS)
    return int(name.removeprefix("stage").partition("_")[0])
