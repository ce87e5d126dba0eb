"""The whole run: one tree of sections."""

from dataclasses import dataclass, field

from ringctx.config.checks import Rule, is_power_of_two, require
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
        require([self._heads_rule(), *self._mixer_rules()])

    def _heads_rule(self) -> Rule:
        heads, degree = self.model.num_heads, self.parallel.ulysses_degree
        fits = [str(n) for n in range(1, heads + 1) if heads % n == 0 and is_power_of_two(n)]
        return (
            heads % degree == 0,
            f"parallel.ulysses_degree={degree} does not divide model.num_heads={heads}: "
            f"its ranks take equal shares of the heads; choose one of {', '.join(fits)}",
        )

    def _mixer_rules(self) -> list[Rule]:
        """What the kinds of layers ask of the other sections."""
        model, parallel, curriculum = self.model, self.parallel, self.curriculum
        written = f"model.mixers={model.mixers!r}"
        softmax, lightning = model.has("SW"), model.has("L")
        thetas = any(stage.rope_theta is not None for stage in curriculum.stages)
        return [
            (
                not lightning or parallel.layout != "striped",
                f"parallel.layout=striped does not go with {written}: an L layer hands a state "
                "from one run of tokens to the next, and striped leaves a rank no two tokens in a "
                "row; choose parallel.layout=zigzag, which balances softmax layers too, or "
                "contiguous",
            ),
            (
                lightning or parallel.state_exchange == "auto",
                f"parallel.state_exchange={parallel.state_exchange} has no use: {written} has no L",
            ),
            (
                softmax or parallel.schedule == "auto",
                f"parallel.schedule={parallel.schedule} has no use: {written} has no S or W; for L "
                "layers there is parallel.state_exchange",
            ),
            (
                softmax or parallel.ulysses_degree == 1,
                f"parallel.ulysses_degree={parallel.ulysses_degree} has no use: {written} has no S "
                "or W, and L layers exchange states, not heads",
            ),
            (
                softmax or curriculum.kind != "window",
                f"curriculum.kind=window has no use: {written} has no S or W whose window could "
                "grow; choose curriculum.kind=packed",
            ),
            (
                model.any_rotates or not thetas,
                "curriculum.stages with a rope_theta have no use for it: model.rope_mixers="
                f"{model.rope_mixers!r} names no layer of {written}",
            ),
        ]
