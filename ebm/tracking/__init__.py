"""What a run records, in files and in W&B."""

from ebm.tracking.tracker import Progress, Tracker

__all__ = ["Progress", "Tracker"]
