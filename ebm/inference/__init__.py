"""A trained run opened for use, what it can be given, and pictures of samples."""

from ebm.inference.run import PersistentChains, TrainedRun, open_run

__all__ = ["PersistentChains", "TrainedRun", "open_run"]
