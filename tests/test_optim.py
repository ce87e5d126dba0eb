"""The learning rate is a pure function of the step; only matrices decay."""

import math

from torch import nn

from ringctx.config import OptimConfig
from ringctx.optim import learning_rate, make_optimizer

OPTIM = OptimConfig(lr=2.0, min_lr_ratio=0.25, warmup_steps=4)


def rates(num_steps: int) -> list[float]:
    return [learning_rate(step, num_steps=num_steps, optim=OPTIM) for step in range(num_steps)]


def test_the_rate_rises_evenly_then_falls_on_a_cosine_to_its_floor() -> None:
    assert rates(12)[:4] == [0.5, 1.0, 1.5, 2.0]
    middle = 2.0 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * 4 / 8)))
    assert math.isclose(rates(12)[7], middle)
    assert math.isclose(rates(12)[-1], 0.5)
    assert all(a > b for a, b in zip(rates(12)[3:], rates(12)[4:], strict=False))


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    assert rates(3) == [0.5, 1.0, 1.5]


def test_no_warm_up_starts_near_the_peak() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=0)
    assert learning_rate(0, num_steps=100, optim=optim) > 0.999


def test_a_stage_has_its_own_peak_and_its_own_rise_and_fall() -> None:
    stage = [
        learning_rate(step, num_steps=40, optim=OPTIM, peak=1.0, stage_steps=(20, 32))
        for step in range(20, 32)
    ]
    assert stage == [rate / 2 for rate in rates(12)]


def test_a_stage_that_the_run_does_not_finish_ends_with_the_run() -> None:
    stage = [
        learning_rate(step, num_steps=32, optim=OPTIM, peak=2.0, stage_steps=(20, 99))
        for step in range(20, 32)
    ]
    assert stage == rates(12)


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=True), nn.LayerNorm(3))
    groups = make_optimizer(model, config=OptimConfig(weight_decay=0.1)).param_groups
    decay = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in groups}
    assert decay == {0.1: [2], 0.0: [1, 1, 1]}
