"""BLPO (bilevel policy optimisation with Nyström hypergradients) and its PPO baseline."""

import hypergrad_rl.extra  # noqa: F401

# isort: split
from hypergrad_rl.blpo import BLPO
from hypergrad_rl.config import BLPOConfig, PPOConfig, make_config
from hypergrad_rl.errors import (
    CheckpointError,
    ConfigError,
    EnvironmentFault,
    EnvironmentUnsupported,
    HypergradRLError,
    ObservationError,
    RolloutError,
    RunDirectoryError,
    TrainingDiverged,
)
from hypergrad_rl.networks import Networks
from hypergrad_rl.play import TrainedPolicy, evaluate, export, load_policy, watch
from hypergrad_rl.ppo import PPO
from hypergrad_rl.presets import preset
from hypergrad_rl.run_directory import load_config
from hypergrad_rl.trainer import TrainResult, train

__all__ = [
    "BLPO",
    "PPO",
    "BLPOConfig",
    "CheckpointError",
    "ConfigError",
    "EnvironmentFault",
    "EnvironmentUnsupported",
    "HypergradRLError",
    "Networks",
    "ObservationError",
    "PPOConfig",
    "RolloutError",
    "RunDirectoryError",
    "TrainResult",
    "TrainedPolicy",
    "TrainingDiverged",
    "evaluate",
    "export",
    "load_config",
    "load_policy",
    "make_config",
    "preset",
    "train",
    "watch",
]
