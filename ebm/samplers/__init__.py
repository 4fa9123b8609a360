"""Samplers: pure functions on a callable energy, and a front with the names of the guide."""

from ebm.samplers.dynamics import LangevinDynamics
from ebm.samplers.engine import Engine
from ebm.samplers.langevin import ChainInfo, fresh_chains, langevin, schedule, settings_of

__all__ = ["ChainInfo", "Engine", "LangevinDynamics", "fresh_chains", "langevin", "schedule", "settings_of"]
