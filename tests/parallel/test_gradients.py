"""Gradients of whole parameters add up over the ranks, once, and those of an engine do not."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ringctx.errors import LayoutError
from ringctx.parallel.context import ContextParallel
from tests.ranks import run_ranks


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _reduce() -> None:
    context, rank = ContextParallel(group=_world()), dist.get_rank()
    p = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in ("all", "one", "none")})
    p["frozen"] = nn.Parameter(torch.ones(3), requires_grad=False)
    p["bf16"] = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p["all"].grad = torch.full((3,), rank + 1.0)
    # In bf16 256 + 1 is 256: a sum in that dtype would lose every rank but one.
    p["bf16"].grad = torch.full((3,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    if rank == 1:
        p["one"].grad = torch.full((3,), 7.0)
    context.reduce_gradients(p)
    assert p["all"].grad.tolist() == [6.0] * 3
    assert p["one"].grad is not None and p["one"].grad.tolist() == [7.0] * 3
    assert p["none"].grad is None and p["frozen"].grad is None
    assert p["bf16"].grad.tolist() == [258.0] * 3


def test_gradients_add_up_where_any_rank_has_one() -> None:
    run_ranks(3, _reduce)


def _fill_buckets() -> None:
    # Above and below the size at which a bucket leaves.
    p = nn.ParameterList(torch.ones(n) for n in (5, 2**24, 3))
    for i, parameter in enumerate(p):
        parameter.grad = torch.full_like(parameter, i + 1.0)
    ContextParallel(group=_world()).reduce_gradients(p)
    for i, parameter in enumerate(p):
        assert parameter.grad is not None and bool((parameter.grad == 2 * (i + 1.0)).all())


def test_large_gradients_add_up_too() -> None:
    run_ranks(2, _fill_buckets)


def _reduce_in_engine(engine: str) -> None:
    torch.manual_seed(6)
    inner, context = nn.Linear(4, 4), ContextParallel(group=_world())
    match engine:
        case "ddp":
            model: nn.Module = DistributedDataParallel(inner)
        case "ddp beside the ring":
            own = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
            model = DistributedDataParallel(inner, process_group=own[dist.get_rank()])
        case "fully_shard":
            fully_shard(inner)
            model = inner
        case _:
            model = FullyShardedDataParallel(
                inner, device_id=torch.device("cpu"), use_orig_params=engine.endswith("orig")
            )
    model(torch.ones(1, 4) * (dist.get_rank() + 1)).sum().backward()
    if engine == "ddp beside the ring":
        context.reduce_gradients(model)
        assert inner.weight.grad is not None and inner.weight.grad.tolist() == [[3.0] * 4] * 4
        return
    match = "DistributedDataParallel has averaged" if engine == "ddp" else f"by {engine.split()[0]}"
    with pytest.raises(LayoutError, match=match):
        context.reduce_gradients(model)
    if engine == "FullyShardedDataParallel":
        with pytest.raises(LayoutError, match=match):
            context.reduce_gradients(model.parameters())


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        "ddp beside the ring",
        "fully_shard",
        "FullyShardedDataParallel",
        "FullyShardedDataParallel orig",
    ],
)
def test_gradients_that_an_engine_averaged_are_not_summed_again(engine: str) -> None:
    run_ranks(2, _reduce_in_engine, engine)
