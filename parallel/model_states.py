"""Weights, gradients and optimizer states over one fixed, flat world, whatever the step's layout.

An engine holds the model. Both average gradients over all ranks, so a loss of
`sum_local * world / targets_global` gives the gradient of the mean token loss of the whole step
under any mix of data and context parallelism.
fsdp2: every rank keeps 1/world of weights, gradients and optimizer states; weights are gathered a
layer at a time, gradients reduced in every microbatch. ddp: every rank keeps all of them; gradients
are averaged once a step.
Source: ZeRO (arXiv 1910.02054); torch's `fully_shard` and `DistributedDataParallel`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ringctx.parallel.mesh import World

__all__ = ["Engine", "Initialiser", "clip_gradients", "make_engine", "whole"]

Initialiser = Callable[[str, torch.Size], Tensor]


class Engine(Protocol):
    """How model states are held; the trainer knows no more of it than this."""

    @property
    def model(self) -> nn.Module:
        """Called as the model itself."""

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a microbatch; averaged gradients exist after the last."""
        ...


class ShardedEngine:
    """FSDP2 over the flat world; a rank never holds more than a layer's whole weights."""

    def __init__(self, model: nn.Module, *, world: World, dtype: torch.dtype) -> None:
        mesh = init_device_mesh(world.device.type, (world.size,))
        # The model itself decides where it computes in fp32 (norms, rotation), so inputs stay.
        precision = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        units = [*_layers(model), model]
        for unit in units:
            gains = _modules_of_vectors(unit)
            if gains and dtype != torch.float32:
                # Rounded to bf16, a gain near 1 would move in steps of 0.8 %.
                fully_shard(gains, mesh=mesh, reshard_after_forward=False)
            fully_shard(unit, mesh=mesh, mp_policy=precision)
        self._model = model

    @property
    def model(self) -> nn.Module:
        """The sharded model."""
        return self._model

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing to do: each microbatch reduces into the shards, so no whole gradient is kept."""
        return nullcontext()


class ReplicatedEngine:
    """DDP over the flat world."""

    def __init__(self, model: nn.Module) -> None:
        self._model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        return self._model

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """All-reduce gradients only in the last microbatch."""
        return nullcontext() if last else self._model.no_sync()


def make_engine(
    model: nn.Module,
    *,
    kind: Literal["fsdp2", "ddp"],
    world: World,
    dtype: torch.dtype,
    initialise: Initialiser,
) -> Engine:
    """Spread a model over the world and give its parameters their starting values.

    Args:
        model: built on the `meta` device; its `layers` are the units of sharding.
        kind: which engine.
        world: all ranks; every one must call this.
        dtype: of the gathered weights under fsdp2.
        initialise: whole starting value of a parameter by name and shape; the same on all ranks.
    """
    if kind == "fsdp2":
        sharded = ShardedEngine(model, world=world, dtype=dtype)
        _materialise(model, device=world.device, initialise=initialise)
        return sharded
    _materialise(model, device=world.device, initialise=initialise)
    return ReplicatedEngine(model)


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], *, max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint 2-norm over all ranks is at most `max_norm`.

    Returns:
        The norm before clipping, a plain scalar, equal on all ranks.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a shard (a collective), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _modules_of_vectors(unit: nn.Module) -> list[nn.Module]:
    """Modules in a unit whose own parameters are all vectors and not yet in another group."""
    return [
        module
        for module in unit.modules()
        if not isinstance(module, FSDPModule)
        and (own := list(module.parameters(recurse=False)))
        and all(parameter.ndim == 1 and not isinstance(parameter, DTensor) for parameter in own)
    ]


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


@torch.no_grad()
def _materialise(model: nn.Module, *, device: torch.device, initialise: Initialiser) -> None:
    """One parameter at a time, so that no rank ever holds two whole ones."""
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        value = initialise(name, parameter.shape)
        if isinstance(parameter, DTensor):
            value = value.to(parameter.device)
            # Every rank has the whole value, so its shard is a slice: no source, no broadcast.
            shard = distribute_tensor(
                value, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(value)
