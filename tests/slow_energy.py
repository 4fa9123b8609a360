"""A small network that takes its time without using the processor: a run that can be caught in its middle anywhere."""

import os
import time

import torch

from ebm.energies import BaseEnergyFunction

# Seconds a forward takes. It is not part of the run's config, and changes no result.
SECONDS = float(os.environ.get("EBM_TEST_SECONDS", "0"))


class SlowEnergy(BaseEnergyFunction):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1)
        )

    def forward(self, x):
        time.sleep(SECONDS)
        return self.net(x).squeeze(1)
