"""Gradients of parameters that every rank of a group has whole: the sum over its ranks.

One idea: each rank's backward gives its own tokens' share, so the gradient is the plain sum. It
travels in flat buffers, at least in fp32. Price: one all-reduce of the parameters a step.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ringctx.errors import LayoutError

__all__ = ["sum_gradients"]

# Elements of one flat buffer, about.
_BUCKET_NUMEL = 16 * 2**20


def sum_gradients(
    parameters: nn.Module | Iterable[nn.Parameter], *, group: dist.ProcessGroup
) -> None:
    """Sum `.grad` over the ranks of `group` in place; every rank must call it.

    A parameter that got no gradient on any rank keeps none.

    Args:
        parameters: a module or its parameters, the same on every rank.
        group: the ranks whose gradients add up.

    Raises:
        LayoutError: if the parameters are sharded over ranks, or DDP averages them over the group.
    """
    if isinstance(parameters, nn.Module):
        _check_wrappers(parameters, group)
        parameters = parameters.parameters()
    trained = [p for p in parameters if p.requires_grad]
    for kind, name in ((DTensor, "fully_shard"), (FlatParameter, "FullyShardedDataParallel")):
        if any(isinstance(p, kind) for p in trained):
            raise _sharded_by(name)
    if not trained:
        return
    # Which parameters are used may differ between ranks: an expert that no local token chose.
    used = torch.tensor([p.grad is not None for p in trained], device=trained[0].device).int()
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    for bucket in _buckets(p for p, flag in zip(trained, used.tolist(), strict=True) if flag):
        _sum_bucket(bucket, group)


def _check_wrappers(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Refuse gradients that an engine has reduced over these ranks before."""
    ranks = set(dist.get_process_group_ranks(group))
    for module in model.modules():
        # With use_orig_params its parameters look like any others, and are pieces.
        if isinstance(module, FullyShardedDataParallel):
            raise _sharded_by("FullyShardedDataParallel")
        if not isinstance(module, DistributedDataParallel):
            continue
        # Over data-parallel groups, one in each place of the ring, it shares this rank alone.
        if len(ranks & set(dist.get_process_group_ranks(module.process_group))) > 1:
            raise LayoutError(
                "DistributedDataParallel has averaged the gradients over ranks that share a "
                "sequence; leave out reduce_gradients and pass averaged_over, the size of its "
                "group, to scale_loss or shard_batch, or give it a process_group of ranks that "
                "share none"
            )


def _sharded_by(engine: str) -> LayoutError:
    return LayoutError(
        f"the parameters are sharded by {engine}, which has averaged their gradients over ranks; "
        "leave out reduce_gradients and pass averaged_over to scale_loss or shard_batch instead"
    )


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device that travel together."""
    filling: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        bucket = filling.setdefault(kind, [])
        bucket.append(parameter)
        if sum(p.numel() for p in bucket) >= _BUCKET_NUMEL:
            yield filling.pop(kind)
    yield from filling.values()


def _sum_bucket(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    grads = [_gradient(p) for p in parameters]
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    flat = torch.cat([grad.flatten().to(wide) for grad in grads])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient to add into; zeros where this rank has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
