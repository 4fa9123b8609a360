"""Samplers: pure functions on a callable energy, and fronts with the names of the guide."""

from ebm.samplers.base import ChainInfo, MixtureStart
from ebm.samplers.dynamics import HamiltonianMonteCarlo, LangevinDynamics, MetropolisAdjustedLangevin, ParallelTempering
from ebm.samplers.engine import Engine
from ebm.samplers.factory import (
    advance,
    can_be_continued,
    chain_shape,
    chains_of_lengths,
    cold_states,
    fresh_chains,
    negative_states,
    sampler_of,
    schedule,
    settings_of,
    with_replicas,
)
from ebm.samplers.langevin import flow, langevin, nesterov
from ebm.samplers.levels import NoiseLevelsInfo, TemperingInfo, annealed, noise_levels, tempering
from ebm.samplers.metropolis import GibbsInfo, MetropolisInfo, adapted, class_flips, hmc, mala, within_gibbs

__all__ = [
    "ChainInfo",
    "Engine",
    "GibbsInfo",
    "HamiltonianMonteCarlo",
    "LangevinDynamics",
    "MetropolisAdjustedLangevin",
    "MetropolisInfo",
    "MixtureStart",
    "NoiseLevelsInfo",
    "ParallelTempering",
    "TemperingInfo",
    "adapted",
    "advance",
    "annealed",
    "can_be_continued",
    "chain_shape",
    "chains_of_lengths",
    "class_flips",
    "cold_states",
    "flow",
    "fresh_chains",
    "hmc",
    "langevin",
    "mala",
    "negative_states",
    "nesterov",
    "noise_levels",
    "sampler_of",
    "schedule",
    "settings_of",
    "tempering",
    "with_replicas",
    "within_gibbs",
]
