"""Distributed training of energy-based models on images."""
