"""AdamW and its learning rate: the rate is a pure function of the step, nothing to restore."""

import math

from torch import nn
from torch.optim import AdamW, Optimizer

from ringctx.config import OptimConfig

__all__ = ["learning_rate", "make_optimizer"]


def make_optimizer(model: nn.Module, *, config: OptimConfig) -> Optimizer:
    """AdamW (arXiv 1711.05101) over all parameters; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def learning_rate(
    step: int,
    *,
    num_steps: int,
    optim: OptimConfig,
    peak: float | None = None,
    stage_steps: tuple[int, int] | None = None,
) -> float:
    """Linear rise over the first `warmup_steps`, then a half cosine down to the last step.

    Args:
        step: from 0.
        num_steps: of the run; the rate of step num_steps - 1 is `min_lr_ratio` of the peak.
        optim: peak, floor and warm-up.
        peak: of the stage that the step belongs to; None: `optim.lr`.
        stage_steps: the stage's first step and the one after its last: the rate rises and falls
            within it, or up to the end of the run if that comes first. None: the whole run.
    """
    peak = optim.lr if peak is None else peak
    first, end = (0, num_steps) if stage_steps is None else stage_steps
    done, steps = step - first, min(end, num_steps) - first
    if done < optim.warmup_steps:
        return peak * (done + 1) / optim.warmup_steps
    share = (done - optim.warmup_steps + 1) / max(1, steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return peak * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)
