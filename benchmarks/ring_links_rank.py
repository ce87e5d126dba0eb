"""One rank of `ring_links.py`: run every variant in turn, and note what each took and moved."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from emulated_kernels import EmulatedKernels
from netlab_probe import settle, wire_bytes
from torch import Tensor
from torch.nn import functional

from ringctx.config import TopologyConfig
from ringctx.parallel import ring_attention, shard
from ringctx.parallel.comm import record_traffic
from ringctx.parallel.cost import route_of_pass
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.ring_attention import PassPlan, RingAttention, wiring_of
from ringctx.parallel.ring_pass import Place
from ringctx.parallel.routes import Route
from ringctx.parallel.traffic import Shape

__all__ = ["DTYPES", "measure"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Settings = dict[str, Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Variant:
    attend: Attend
    # q, k, v, grad_out of this rank, in the layout that the variant wants.
    local: list[Tensor]


def measure(settings: Settings) -> dict[str, dict[str, Any]]:
    """Time each variant once a round; count its bytes; compare it with one process.

    Args:
        settings: the arguments of ring_links.py, and the fields of its topology.

    Returns:
        For each variant `forward_s`, `total_s`, `exposed_s` [rounds], `sent` {rank: bytes} by the
        ledger, `wire` {interface: bytes, headers and what was forwarded included}, `max_error`.
    """
    with _compute(settings):
        variants = _variants(settings)
        # The first run of each, not timed: connections, route tables, first use of kernels.
        errors = _errors(variants, settings)
        rounds: dict[str, list[Settings]] = {name: [] for name in variants}
        for i in range(settings["rounds"]):
            order = list(variants) if i % 2 == 0 else list(reversed(variants))
            for name in order:
                rounds[name].append(_timed(variants[name], settings["passes"] == "both"))
    return {name: _joined(runs) | {"max_error": errors[name]} for name, runs in rounds.items()}


@contextmanager
def _compute(settings: Settings) -> Iterator[None]:
    if settings["compute"] == "real":
        yield
    else:
        with EmulatedKernels(settings["gflops"] * 1e9).installed():
            yield


def _variants(settings: Settings) -> dict[str, _Variant]:
    group, causal = dist.group.WORLD, settings["causal"]
    assert group is not None
    whole = _inputs(settings)
    masks = {"causal": causal, "window": settings["window"]}
    layout = settings["layout"]
    topology = TopologyConfig(**settings["topology"])

    def ours(schedule: str) -> Attend:
        if schedule == "one_way_everywhere":
            return _everywhere(layout=layout, topology=topology, **masks)
        if schedule == "ulysses":
            from ringctx.parallel.ulysses import ulysses_attention

            return lambda q, k, v: ulysses_attention(q, k, v, group=group, layout=layout, **masks)
        options = {"layout": layout, "schedule": schedule, "topology": topology} | masks
        return lambda q, k, v: ring_attention(q, k, v, group=group, **options)

    attends = {name: (ours(name), layout) for name in settings["schedules"]}
    if settings["peers"]:
        # Only where the interpreter of the ranks has them.
        from peers.drivers import layout_of, load

        for name, attend in load(settings["peers"], group=group, causal=causal).items():
            attends[name] = (attend, layout_of(name, causal=causal))
    return {name: _Variant(attend, _local(whole, x)) for name, (attend, x) in attends.items()}


def _everywhere(*, layout: str, topology: TopologyConfig, **masks: Any) -> Attend:
    """The ring as peers run it: each shard visits all ranks, whoever needs it."""
    group = dist.group.WORLD
    assert group is not None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sharding = Sharding(q.shape[1] * dist.get_world_size(), dist.get_world_size(), layout)
        mask = Mask.checked(sinks=0, cu_seqlens=None, seq_len=sharding.seq_len, **masks)
        heads, head_dim = q.shape[2:]
        plan = _EverywherePlan(
            Place(group=group, sharding=sharding, mask=mask, scale=head_dim**-0.5),
            Shape(heads=heads, kv_heads=k.shape[2], head_dim=head_dim, dtype=q.dtype),
            wiring_of(group, topology),
            "one_way",
        )
        out: Tensor = RingAttention.apply(q, k, v, plan)[0]  # type: ignore[no-untyped-call]
        return out

    return attend


class _EverywherePlan(PassPlan):
    """Routes for a mask that hides nothing, whatever the mask."""

    def route(self, *, backward: bool) -> Route:
        return route_of_pass(
            self.schedule,
            backward=backward,
            shape=self.shape,
            sharding=self.place.sharding,
            mask=Mask(causal=False),
            wiring=self.wiring,
        )


def _inputs(settings: Settings) -> list[Tensor]:
    """q, k, v, grad_out of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads = settings["heads"], settings["kv_heads"]
    dtype = DTYPES[settings["dtype"]]
    shapes = [
        (1, settings["seq_len"], n, settings["head_dim"])
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _local(whole: list[Tensor], layout: str) -> list[Tensor]:
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    return [shard(x, layout=layout, **place).contiguous() for x in whole]


def _errors(variants: dict[str, _Variant], settings: Settings) -> dict[str, float | None]:
    """The largest error of this rank's out and gradients, relative to each tensor's largest entry.

    None where the numbers are not computed for real, or nobody asked.
    """
    if not (settings["verify"] and settings["compute"] == "real"):
        for variant in variants.values():
            _timed(variant, settings["passes"] == "both")
        return dict.fromkeys(variants)
    whole = _inputs(settings)
    expected = _results(_single_process(settings), whole)
    errors: dict[str, float | None] = {}
    for name, variant in variants.items():
        layout = _layout_of(name, settings)
        pairs = zip(_results(variant.attend, variant.local), _local(expected, layout), strict=True)
        errors[name] = max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)
    return errors


def _layout_of(name: str, settings: Settings) -> str:
    if name not in settings["peers"]:
        layout: str = settings["layout"]
        return layout
    from peers.drivers import layout_of

    return layout_of(name, causal=settings["causal"])


def _single_process(settings: Settings) -> Attend:
    seq_len, window, causal = (settings[name] for name in ("seq_len", "window", "causal"))
    mask = None
    if window is not None:
        behind = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
        mask = (behind >= 0) & (behind < window)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal and mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)

    return attend


def _results(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def _timed(variant: _Variant, both: bool) -> Settings:
    q, k, v, grad_out = variant.local
    leaves = [x.detach().requires_grad_(both) for x in (q, k, v)]
    before = wire_bytes()
    settle()
    with record_traffic() as ledger:
        start_s = time.perf_counter()
        out = variant.attend(*leaves)
        forward_s = time.perf_counter() - start_s
        if both:
            torch.autograd.grad(out, leaves, grad_out)
        total_s = time.perf_counter() - start_s
    # What this host forwards for others has left it when all are done.
    settle()
    after = wire_bytes()
    return {
        "forward_s": forward_s,
        "total_s": total_s,
        "exposed_s": ledger.exposed_s(),
        "sent": {str(peer): count for peer, count in sorted(ledger.sent.items())},
        "wire": {name: after[name] - before[name] for name in after},
    }


def _joined(runs: list[Settings]) -> Settings:
    """Times by round; what is sent is the same in every round."""
    assert all(run["sent"] == runs[0]["sent"] for run in runs), [run["sent"] for run in runs]
    lists = {name: [run[name] for run in runs] for name in ("forward_s", "total_s", "exposed_s")}
    return lists | {"sent": runs[0]["sent"], "wire": runs[-1]["wire"]}
