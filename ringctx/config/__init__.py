"""The whole run as one tree of frozen dataclasses; the YAML file mirrors it.

Sizes are tokens. Off is null. Each section checks what it can know by itself when it is made;
what depends on the dataset or the number of ranks is checked where that is known.
`ringctx.config_file` reads and writes the YAML.
"""

from ringctx.config.curriculum import CurriculumConfig, StageConfig
from ringctx.config.curriculum_rules import ODDS
from ringctx.config.data import DataConfig
from ringctx.config.mix import split_mix_key
from ringctx.config.model import MIXERS, DecayStyle, LightningBackend, ModelConfig
from ringctx.config.parallel import (
    Layout,
    ParallelConfig,
    Schedule,
    StateExchange,
    TopologyConfig,
    TopologyKind,
)
from ringctx.config.run import Config
from ringctx.config.training import CheckpointConfig, OptimConfig, TrackingConfig, TrainConfig

__all__ = [
    "MIXERS",
    "ODDS",
    "CheckpointConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "DecayStyle",
    "Layout",
    "LightningBackend",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Schedule",
    "StageConfig",
    "StateExchange",
    "TopologyConfig",
    "TopologyKind",
    "TrackingConfig",
    "TrainConfig",
    "split_mix_key",
]
