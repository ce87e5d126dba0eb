"""One step's gradients: the model in its engine, and what a rank feeds it.

Loss of a rank: sum of its token losses * world / targets of the whole step. The engines average
gradients over the world, so the gradient is that of the mean loss over all targets of the step,
whatever the mix of data and context parallelism, accumulation, or rows without targets.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ringctx.config import Config
from ringctx.data import Microbatch, RowShard
from ringctx.model import Transformer, initialise
from ringctx.parallel import positions
from ringctx.parallel.mesh import ContextMesh, World
from ringctx.parallel.model_states import Engine, make_engine

__all__ = [
    "accumulate_gradients",
    "build_engine",
    "build_model",
    "model_arguments",
    "row_shard",
    "starting_value",
]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(config: Config) -> Transformer:
    """The model that a config describes, not yet with its starting weights."""
    return Transformer(
        config.model,
        dtype=_DTYPES[config.train.dtype],
        recompute=config.train.recompute == "layer",
        loss_chunk=config.train.loss_chunk,
    )


def starting_value(name: str, shape: torch.Size, *, config: Config) -> Tensor:
    """The value of a parameter at step 0, the same on all ranks."""
    return initialise(name, shape, config=config.model, seed=config.train.seed)


def build_engine(
    config: Config, *, world: World, start: Callable[..., Tensor] = starting_value
) -> Engine:
    """The model with its starting weights, spread over the world.

    Args:
        config: of the run.
        world: all ranks; every rank must call it.
        start: called as `starting_value`, once a parameter.
    """
    with torch.device("meta"):
        model = build_model(config)
    return make_engine(
        model,
        kind=config.parallel.engine,
        world=world,
        dtype=_DTYPES[config.train.dtype],
        initialise=partial(start, config=config),
    )


def row_shard(mesh: ContextMesh, *, bucket_len: int) -> RowShard:
    """What the loader reads for this rank in the steps of one length."""
    sizes = mesh.sizes
    alone, joined = (
        positions(
            rows * bucket_len,
            rank=mesh.cp_rank,
            world_size=sizes.cp_degree,
            layout=mesh.layout,
        ).numpy()
        for rows in (1, sizes.rows)
    )
    return RowShard(
        dp_rank=mesh.dp_rank,
        dp_degree=sizes.dp_degree,
        rows=sizes.rows,
        positions=alone,
        joined_positions=joined,
    )


def model_arguments(
    batch: Microbatch, *, mesh: ContextMesh, device: torch.device
) -> dict[str, Any]:
    """What the model's forward takes, by name; tensors are on their way to the device.

    Args:
        batch: of this rank.
        mesh: of the step's length.
        device: of the model.
    """
    tensors = {"tokens": batch.tokens, "targets": batch.targets, "positions": batch.positions}
    return {
        **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()},
        "mesh": mesh,
        "cu_seqlens": batch.cu_seqlens,
        "window": batch.window,
        "rope_theta": batch.rope_theta,
    }


def accumulate_gradients(
    engine: Engine,
    batches: Sequence[Microbatch],
    *,
    mesh: ContextMesh,
    world: World,
    num_targets: int,
) -> Tensor:
    """Forward and backward of a step's microbatches; gradients end up averaged over the ranks.

    Args:
        engine: holds the model; its gradients are empty.
        batches: this rank's share of the step.
        mesh: of the step's length.
        world: all ranks.
        num_targets: of the whole step; where it has none, loss and gradients are 0.

    Returns:
        Sum of the losses of this rank's tokens, a scalar without gradient.
    """
    total = torch.zeros((), device=world.device)
    scale = world.size / max(1, num_targets)
    for index, batch in enumerate(batches):
        with engine.microbatch(last=index == len(batches) - 1):
            loss_sum = engine.model(**model_arguments(batch, mesh=mesh, device=world.device))
            (loss_sum * scale).backward()
        total += loss_sum.detach()
    return total
