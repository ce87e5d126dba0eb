"""One rank of `lightning_links.py`: run every variant in turn; what each took and moved."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from netlab_probe import settle, wire_bytes
from torch import Tensor

from ringctx.ops.lightning import lightning_attention
from ringctx.ops.lightning.decay_styles import log_decay
from ringctx.parallel import context_lightning, shard
from ringctx.parallel.comm import record_traffic
from ringctx.parallel.layout import Sharding
from ringctx.parallel.parts import chain_of
from ringctx.parallel.state_exchange import StateExchange
from ringctx.parallel.ulysses import attend_by_heads

__all__ = ["HEAD_SPLIT", "NO_EXCHANGE", "links", "speed"]

HEAD_SPLIT, NO_EXCHANGE = "head_split zigzag", "no_exchange"
# Tokens of a rank whose results are compared with one process.
_VERIFIED = 512

Settings = dict[str, Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Variant:
    attend: Attend
    # q, k, v, grad_out of this rank; none where it only waits for the others.
    local: list[Tensor]


def links(settings: Settings) -> dict[str, dict[str, Any]]:
    """Time every exchange with real work, alone, and beside a trade of tokens for heads.

    Args:
        settings: `tokens` of a rank, `heads`, `head_dim`, `rounds`, `head_split_rounds`,
            `exchanges`, `layouts`.

    Returns:
        For each variant `total_s`, `cpu_s`, `queued_s`, `exposed_s` [rounds], `sent` {rank: bytes}
        by the ledger, `wire` {interface: bytes, headers included}, and `max_error`; exchanges of
        states `alone_s` [rounds] too, without work, both directions.
    """
    attends = _attends(settings)
    errors = _errors(attends, settings)
    local = _random(settings["tokens"], settings, seed=dist.get_rank())
    runs: dict[str, list[Settings]] = {name: [] for name in attends}
    alone_s: dict[str, list[float]] = {name: [] for name in attends if _is_state(name)}
    # Round -1 does not count: first use of memory and connections.
    for i in range(-1, settings["rounds"]):
        for name in list(attends)[:: -1 if i % 2 else 1]:
            if name == HEAD_SPLIT and not 0 <= i < settings["head_split_rounds"]:
                continue
            found = _timed(_Variant(attends[name], local))
            alone = _alone_s(name, settings) if _is_state(name) else 0.0
            if i >= 0:
                runs[name].append(found)
            if i >= 0 and name in alone_s:
                alone_s[name].append(alone)
    return {
        name: _joined(found)
        | {"max_error": errors[name]}
        | ({"alone_s": alone_s[name]} if name in alone_s else {})
        for name, found in runs.items()
        if found
    }


def speed(settings: Settings) -> dict[str, dict[str, Any]]:
    """Time one process with all tokens while the others wait, and all ranks with a share each.

    Args:
        settings: as `links`; `tokens` of all ranks together.

    Returns:
        For each variant `total_s`, `cpu_s` and `queued_s` [rounds]; of one process on rank 0 alone.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = _random(settings["tokens"], settings, seed=0)
    decay = _decay(settings)

    def serial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_attention(q, k, v, log_decay=decay, return_state=False)[0]

    place = {"rank": rank, "world_size": size}
    shards = {
        layout: [shard(x, layout=layout, **place).contiguous() for x in whole]
        for layout in settings["layouts"]
    }
    variants = {"serial": _Variant(serial, whole if rank == 0 else [])}
    variants |= {f"ranks {x}": _Variant(_states("auto", x, decay), shards[x]) for x in shards}
    # What the machine gives to processes that do not talk; each forgets what came before.
    variants[NO_EXCHANGE] = _Variant(serial, next(iter(shards.values())))
    runs: dict[str, list[Settings]] = {name: [] for name in variants}
    for i in range(-1, settings["rounds"]):
        for name in list(variants)[:: -1 if i % 2 else 1]:
            found = _timed(variants[name])
            if i >= 0:
                runs[name].append(found)
    return {
        name: {key: [run[key] for run in found] for key in ("total_s", "cpu_s", "queued_s")}
        for name, found in runs.items()
        if variants[name].local
    }


def _attends(settings: Settings) -> dict[str, Attend]:
    group, decay = dist.group.WORLD, _decay(settings)
    assert group is not None
    own = decay.chunk(dist.get_world_size())[dist.get_rank()]

    def head_split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_by_heads(
            (q, k, v),
            group=group,
            ulysses_group=group,
            layout="zigzag",
            settings={},
            check=lambda _: None,
            attend=lambda q, k, v: lightning_attention(q, k, v, log_decay=own)[0],
        )

    attends: dict[str, Attend] = {
        f"{exchange} {layout}": _states(exchange, layout, decay)
        for exchange in settings["exchanges"]
        for layout in settings["layouts"]
    }
    attends[NO_EXCHANGE] = lambda q, k, v: lightning_attention(q, k, v, log_decay=decay)[0]
    if settings["head_split_rounds"]:
        attends[HEAD_SPLIT] = head_split
    return attends


def _states(exchange: str, layout: str, decay: Tensor) -> Attend:
    group = dist.group.WORLD
    assert group is not None
    return lambda q, k, v: context_lightning(
        q, k, v, log_decay=decay, group=group, layout=layout, exchange=exchange
    )


def _is_state(name: str) -> bool:
    return name not in (HEAD_SPLIT, NO_EXCHANGE)


def _decay(settings: Settings) -> Tensor:
    return log_decay(settings["heads"], style="alibi")


def _random(tokens: int, settings: Settings, *, seed: int) -> list[Tensor]:
    """q, k, v, grad_out."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, tokens, settings["heads"], settings["head_dim"])
    return [torch.randn(shape, generator=generator) for _ in range(4)]


def _errors(attends: dict[str, Attend], settings: Settings) -> dict[str, float | None]:
    """The largest error of out and gradients, relative to each one's largest entry."""
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    tokens = min(_VERIFIED, settings["tokens"]) * place["world_size"]
    whole = _random(tokens, settings, seed=0)
    serial = _results(
        lambda q, k, v: lightning_attention(q, k, v, log_decay=_decay(settings))[0], whole
    )
    errors: dict[str, float | None] = {NO_EXCHANGE: None}
    for name, attend in attends.items():
        if name == NO_EXCHANGE:
            continue
        layout = name.split()[1]
        local, expected = (
            [shard(x, layout=layout, **place).contiguous() for x in xs] for xs in (whole, serial)
        )
        pairs = zip(_results(attend, local), expected, strict=True)
        errors[name] = max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)
    return errors


def _results(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def _timed(variant: _Variant) -> Settings:
    """Forward and backward; all ranks start together."""
    before = wire_bytes()
    settle()
    with record_traffic() as ledger:
        queued_s = _queued_s()
        start_s, cpu_s = time.perf_counter(), time.process_time()
        if variant.local:
            _results(variant.attend, variant.local)
        total_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
        queued_s = _queued_s() - queued_s
    settle()
    after = wire_bytes()
    return {
        "total_s": total_s,
        "cpu_s": cpu_s,
        "queued_s": queued_s,
        "exposed_s": ledger.exposed_s(),
        "sent": {str(peer): count for peer, count in sorted(ledger.sent.items())},
        "wire": {name: after[name] - before[name] for name in after},
    }


def _queued_s() -> float:
    """Seconds that this thread was ready to run and had no core, since it began."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def _alone_s(name: str, settings: Settings) -> float:
    """Both directions of an exchange of states, started and waited for with no work between."""
    (exchange, layout), group = name.split(), dist.group.WORLD
    assert group is not None
    size, heads, dim = dist.get_world_size(), settings["heads"], settings["head_dim"]
    chain = chain_of(Sharding(settings["tokens"] * size, size, layout), None)
    slots = len(chain.parts_of(dist.get_rank()))
    under = StateExchange(group, chain, exchange, _decay(settings).double())
    leaving, decays = torch.zeros(slots, 1, heads, dim, dim), torch.zeros(slots, 1, heads)
    total_s = 0.0
    for backward in (False, True):
        settle()
        start_s = time.perf_counter()
        under.start(leaving, decays, backward=backward).wait()
        total_s += time.perf_counter() - start_s
    settle()
    return total_s


def _joined(runs: list[Settings]) -> Settings:
    """Times by round; what is sent is the same in every round."""
    assert all(run["sent"] == runs[0]["sent"] for run in runs), [run["sent"] for run in runs]
    names = ("total_s", "cpu_s", "queued_s", "exposed_s")
    lists = {name: [run[name] for run in runs] for name in names}
    return lists | {"sent": runs[0]["sent"], "wire": runs[-1]["wire"]}
