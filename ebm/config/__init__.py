"""The configuration: every key with its type, default and meaning, each stated once. Unknown keys are errors."""

from ebm.config.describing import changes, check_same_run, describe, differences, flatten, to_yaml
from ebm.config.energies import ConvConfig, EnergyConfig, ImportConfig, MLPConfig, ResNetConfig
from ebm.config.loading import DEFAULT_CONFIG, check_places, load_config, validate
from ebm.config.losses import ContrastiveConfig
from ebm.config.reading import MAX_BYTES
from ebm.config.samplers import HMCConfig, LangevinConfig, MALAConfig, NoiseLevelsConfig, SamplerConfig, TemperingConfig
from ebm.config.section import TrackingConfig
from ebm.config.sections import Config, DataConfig, HealthConfig, ObjectStore, OptimConfig, TrainConfig

__all__ = [
    "DEFAULT_CONFIG",
    "MAX_BYTES",
    "Config",
    "ContrastiveConfig",
    "ConvConfig",
    "DataConfig",
    "EnergyConfig",
    "HMCConfig",
    "HealthConfig",
    "ImportConfig",
    "LangevinConfig",
    "MALAConfig",
    "MLPConfig",
    "NoiseLevelsConfig",
    "ObjectStore",
    "OptimConfig",
    "ResNetConfig",
    "SamplerConfig",
    "TemperingConfig",
    "TrackingConfig",
    "TrainConfig",
    "changes",
    "check_places",
    "check_same_run",
    "describe",
    "differences",
    "flatten",
    "load_config",
    "to_yaml",
    "validate",
]
