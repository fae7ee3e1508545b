"""Train a pruned, mixed-precision CIFAR ResNet synchronously, and measure the gain."""

__version__ = "0.1.0"
