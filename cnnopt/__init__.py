"""Train a pruned, mixed-precision CIFAR ResNet synchronously, and measure what that bought."""

__version__ = "0.1.0"
