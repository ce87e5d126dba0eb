"""The whole run: one tree of sections."""

from dataclasses import dataclass, field

from ringctx.config.checks import is_power_of_two, require
from ringctx.config.curriculum import CurriculumConfig
from ringctx.config.data import DataConfig
from ringctx.config.model import ModelConfig
from ringctx.config.parallel import ParallelConfig
from ringctx.config.training import (
    CheckpointConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = ["Config"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Check what concerns two sections."""
        heads, degree = self.model.num_heads, self.parallel.ulysses_degree
        fits = [str(n) for n in range(1, heads + 1) if heads % n == 0 and is_power_of_two(n)]
        require(
            [
                (
                    heads % degree == 0,
                    f"parallel.ulysses_degree={degree} does not divide model.num_heads={heads}: "
                    f"its ranks take equal shares of the heads; choose one of {', '.join(fits)}",
                )
            ]
        )
