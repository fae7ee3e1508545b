"""The CIFAR ResNet of He et al. 2016 in PyTorch, with parameter-free shortcuts, as in cnnopt.model.resnet."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Two convolutions and the parameter-free shortcut of He et al. 2016, section 4.2."""

    def __init__(self, before: int, filters: int) -> None:
        super().__init__()
        self.stride = filters // before
        self.conv1 = nn.Conv2d(before, filters, 3, self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(filters), nn.BatchNorm2d(filters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, before, h, w] to [batch, filters, h / stride, w / stride]."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            channels = x.shape[1]
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, channels // 2, channels // 2))
        return functional.relu(x + y)


def resnet(depth: int, device: str = "cpu") -> nn.Module:
    """The network for 10 classes, in channels_last, which is the faster layout on CPUs and on tensor cores."""
    blocks, before = [], 16
    for filters in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            blocks.append(Block(before, filters))
            before = filters
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).to(device, memory_format=torch.channels_last)  # fmt: skip
