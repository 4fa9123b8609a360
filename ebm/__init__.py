"""Distributed training of energy-based models on images."""

__version__ = "0.2.0"
