"""Losses: functions of an energy and tensors."""

from ebm.losses.contrastive import LossOutput, contrastive_divergence

__all__ = ["LossOutput", "contrastive_divergence"]
