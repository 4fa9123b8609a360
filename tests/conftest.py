"""One thread a test process: small tensors gain nothing from more, and every machine then adds in the same order."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # a plain `pytest` finds the package too
torch.set_num_threads(1)
