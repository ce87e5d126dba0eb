"""The sections `optim`, `train`, `checkpoint` and `tracking`: the loop and what it leaves."""

from dataclasses import dataclass
from typing import Literal

from ringctx.config.checks import require

__all__ = ["CheckpointConfig", "OptimConfig", "TrackingConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    warmup_steps: int = 100
    """Steps of linear rise from 0 to lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging factors of the gradient and its square."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; null: no clipping."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            [
                (self.lr > 0, f"optim.lr={self.lr} must be above 0"),
                (
                    0 <= self.min_lr_ratio <= 1,
                    f"optim.min_lr_ratio={self.min_lr_ratio} must lie between 0 and 1",
                ),
                (self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps} is negative"),
                (
                    all(0 <= beta < 1 for beta in self.betas),
                    f"optim.betas={list(self.betas)} must lie in [0, 1)",
                ),
                (self.eps > 0, f"optim.eps={self.eps} must be above 0"),
                (self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} is negative"),
                (
                    self.clip_norm is None or self.clip_norm > 0,
                    f"optim.clip_norm={self.clip_norm} must be above 0, or null for no clipping",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    run_dir: str = "runs/default"
    """Folder for config, metrics, checkpoints, logs and plots of this run."""
    steps: int | None = None
    """Optimizer steps; null: the whole plan."""
    stop_after: int | None = None
    """Save and stop after this many steps in all, as if interrupted; the schedule stays."""
    seed: int = 0
    """Seed of the weights and of the order of sequences."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: compute in bf16, keep weights, reductions and optimizer in fp32."""
    recompute: Literal["none", "layer"] = "none"
    """layer: keep only each layer's input and run the layer again in backward (ring included)."""
    loss_chunk: int | None = 1024
    """Tokens whose logits exist at once; null: all of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            [
                (bool(self.run_dir), "train.run_dir is empty: name a folder for the run"),
                (
                    self.steps is None or self.steps > 0,
                    f"train.steps={self.steps} must be positive, or null for the whole plan",
                ),
                (
                    self.stop_after is None or self.stop_after > 0,
                    f"train.stop_after={self.stop_after} must be positive, or null",
                ),
                (self.seed >= 0, f"train.seed={self.seed} must not be negative"),
                (
                    self.loss_chunk is None or self.loss_chunk > 0,
                    f"train.loss_chunk={self.loss_chunk} must be positive, or null",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and from where it starts."""

    every: int | None = 1000
    """Steps between checkpoints; null: only at the end."""
    keep: int | None = 3
    """Newest checkpoints to keep; null: all."""
    resume: int | Literal["auto", "never"] = "auto"
    """auto: the newest good one in run_dir, if any; never: refuse a used folder; or a step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            [
                (
                    self.every is None or self.every > 0,
                    f"checkpoint.every={self.every} must be positive, or null for the end only",
                ),
                (
                    self.keep is None or self.keep > 0,
                    f"checkpoint.keep={self.keep} must be positive, or null to keep all",
                ),
                (
                    isinstance(self.resume, str) or self.resume > 0,
                    f"checkpoint.resume={self.resume} must be 'auto', 'never' or a step",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is shown while the run goes on; metrics.jsonl is always written."""

    log_every: int = 10
    """Steps between log lines where standard error is not a terminal."""
    wandb: str | None = None
    """Weights & Biases project; null: off. Offline when there is no key."""
    peak_flops: float | None = None
    """FLOP/s of one rank at its best in train.dtype, for the mfu of a step; null: no mfu."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            [
                (self.log_every > 0, f"tracking.log_every={self.log_every} must be positive"),
                (
                    self.peak_flops is None or self.peak_flops > 0,
                    f"tracking.peak_flops={self.peak_flops} must be above 0, or null for no mfu",
                ),
            ]
        )
