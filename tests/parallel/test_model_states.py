"""Engines hold the same model: starting values, gradients, and the global norm."""

import math
from functools import partial
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.config import ModelConfig
from ringctx.model import Transformer, initialise
from ringctx.parallel.mesh import World
from ringctx.parallel.model_states import Engine, clip_gradients, make_engine, whole
from tests.ranks import run_ranks

# Seven rows of vocabulary and odd widths: shards differ in size, and one of eight is empty.
CONFIG = ModelConfig(vocab_size=7, dim=6, num_layers=1, num_heads=3, mlp_dim=5)
Kind = Literal["fsdp2", "ddp"]


def build(kind: Kind) -> Engine:
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device("cpu"))
    with torch.device("meta"):
        model = Transformer(CONFIG)
    return make_engine(
        model,
        kind=kind,
        world=world,
        dtype=torch.float32,
        initialise=partial(initialise, config=CONFIG, seed=5),
    )


def _check_values(kind: Kind) -> None:
    for name, parameter in build(kind).model.named_parameters():
        plain = name.removeprefix("module.")
        assert torch.equal(
            whole(parameter.detach()), initialise(plain, parameter.shape, config=CONFIG, seed=5)
        ), name


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_starting_values_do_not_depend_on_engine_or_world(kind: Kind, world_size: int) -> None:
    run_ranks(world_size, _check_values, kind)


def _clip(kind: Kind, max_norm: float | None) -> tuple[float, float]:
    parameters = list(build(kind).model.parameters())
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    before = clip_gradients(parameters, max_norm=max_norm)
    after = math.sqrt(sum(float(whole(_grad(p)).square().sum()) for p in parameters))
    return float(before), after


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_norm_is_that_of_the_whole_model_on_any_world(kind: Kind, world_size: int) -> None:
    model = Transformer(CONFIG)
    norm = math.sqrt(
        sum((index + 1.0) ** 2 * p.numel() for index, p in enumerate(model.parameters()))
    )
    for before, after in run_ranks(world_size, _clip, kind, 0.5):
        assert math.isclose(before, norm, rel_tol=1e-6)
        assert math.isclose(after, 0.5, rel_tol=1e-4)
    for before, after in run_ranks(world_size, _clip, kind, None):
        assert math.isclose(before, after, rel_tol=1e-6)
