"""`ringctx plan attention`: what each schedule costs on a topology, and which `auto` takes.

Asks the function that `auto` asks, so it answers before anything is run, for any number of ranks.
"""

import argparse
import json
import re
import sys
from typing import Any, get_args

import torch

from ringctx.config import TopologyConfig, TopologyKind
from ringctx.config_file import parse_size
from ringctx.errors import ConfigError, LayoutError
from ringctx.parallel.cost import Choice, PassCost, choose
from ringctx.parallel.layout import LAYOUTS, Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.topology import Wiring, wire_up
from ringctx.parallel.traffic import Shape

__all__ = ["add_plan_commands"]

# A field of TopologyConfig in a message.
_FIELD = re.compile(r"(?:parallel\.)?topology\.([a-z_]+)(=?)")
# Ranks beyond which pricing takes more than some seconds.
_MANY = 256
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_plan_commands(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Register the commands; each sets `run`, a function of the arguments to an exit status."""
    plan = subparsers.add_parser("plan", help="predict costs before anything runs")
    commands = plan.add_subparsers(metavar="COMMAND", required=True)
    attention = commands.add_parser(
        "attention", help="time, bytes and memory of each schedule of ring attention"
    )
    _add_attention(attention)
    _add_topology(attention)
    attention.add_argument("--json", action="store_true", help="print one JSON object")
    attention.set_defaults(run=_attention)


def _add_attention(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--seq-len", required=True, metavar="LEN", help="tokens of the whole sequence, like 1M")
    add("--heads", required=True, type=int, metavar="H", help="query heads")
    add("--kv-heads", type=int, metavar="H", help="key/value heads (as many as query heads)")
    add("--head-dim", type=int, default=128, metavar="D", help="width of a head (%(default)s)")
    add("--batch", type=int, default=1, metavar="B", help="sequences at once (%(default)s)")
    add("--dtype", choices=_DTYPES, default="bf16", help="of q, k and v (%(default)s)")
    add("--layout", choices=LAYOUTS, default="zigzag", help="who holds what (%(default)s)")
    add("--full", action="store_true", help="every token sees every other (causal)")
    add("--window", metavar="LEN", help="tokens that a token sees, itself included (all)")
    add("--sinks", metavar="LEN", default="0", help="first tokens seen beyond the window (0)")
    add("--documents", metavar="LEN", help="packed rows: documents of LEN tokens (one)")


def _add_topology(command: argparse.ArgumentParser) -> None:
    add, default = command.add_argument, TopologyConfig()
    add("--ranks", required=True, type=int, metavar="N", help="ranks that share the sequence")
    add("--topology", choices=get_args(TopologyKind), default=default.kind, help="(%(default)s)")
    add("--link-gbit", type=float, default=default.link_gbit, metavar="G", help="(%(default)s)")
    add("--latency-us", type=float, default=default.latency_us, metavar="T", help="(%(default)s)")
    add("--ranks-per-node", type=int, metavar="N", help="for two_level")
    add("--node-gbit", type=float, metavar="G", help="for two_level: inside a node (8 x link)")
    add("--flops", type=float, default=default.flops, help="FLOP/s of one rank (%(default)g)")


def _attention(args: argparse.Namespace) -> int:
    shape = _shape(args)
    if args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks} must be at least 1")
    sharding = _sharding(args)
    mask, wiring = _mask(args, sharding.seq_len), _wiring(args)
    if args.ranks > _MANY:
        sys.stderr.write(
            f"ringctx: pricing every schedule on {args.ranks:,} ranks takes a while: on 1,024 "
            "a minute or more\n"
        )
    choice = choose(shape=shape, sharding=sharding, mask=mask, wiring=wiring)
    if args.json:
        print(json.dumps(_as_json(choice, wiring)))
    else:
        print("\n".join([_headline(shape, sharding, wiring), *_lines(choice)]))
    return 0


def _shape(args: argparse.Namespace) -> Shape:
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    for name, value in (
        ("heads", args.heads),
        ("kv-heads", kv_heads),
        ("head-dim", args.head_dim),
        ("batch", args.batch),
    ):
        if value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    if args.heads % kv_heads:
        raise ConfigError(
            f"--heads {args.heads} is not divisible by --kv-heads {kv_heads}: every K/V head "
            "serves equally many query heads"
        )
    return Shape(
        batch=args.batch,
        heads=args.heads,
        kv_heads=kv_heads,
        head_dim=args.head_dim,
        dtype=_DTYPES[args.dtype],
    )


def _sharding(args: argparse.Namespace) -> Sharding:
    seq_len = _tokens("--seq-len", args.seq_len)
    try:
        return Sharding(seq_len, args.ranks, args.layout)
    except LayoutError as error:
        raise ConfigError(f"--seq-len {args.seq_len} --ranks {args.ranks}: {error}") from error


def _mask(args: argparse.Namespace, seq_len: int) -> Mask:
    window = None if args.window is None else _tokens("--window", args.window)
    sinks = _tokens("--sinks", args.sinks, least=0)
    if window is not None and args.full:
        raise ConfigError(
            f"--window {args.window} does not go with --full: a window counts backwards from a "
            "token that sees only earlier ones; leave one of the two out"
        )
    if sinks and window is None:
        raise ConfigError(
            f"--sinks {args.sinks} has no use without --window: every earlier token is visible"
        )
    return Mask.checked(
        causal=not args.full,
        window=window,
        sinks=sinks,
        cu_seqlens=None if args.documents is None else _borders(args.documents, seq_len),
        seq_len=seq_len,
    )


def _borders(documents: str, seq_len: int) -> torch.Tensor:
    """Where documents of one length begin, and the end of the last, which may be shorter."""
    length = _tokens("--documents", documents)
    if seq_len > torch.iinfo(torch.int32).max:
        raise ConfigError(
            f"--documents goes up to --seq-len {torch.iinfo(torch.int32).max:,}: cu_seqlens is "
            "int32"
        )
    borders = [*range(0, seq_len, length), seq_len]
    return torch.tensor(borders, dtype=torch.int32)


def _tokens(option: str, text: str, *, least: int = 1) -> int:
    try:
        tokens = parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error
    if tokens < least:
        raise ConfigError(f"{option} {text} must be at least {least}")
    return tokens


def _wiring(args: argparse.Namespace) -> Wiring:
    try:
        topology = TopologyConfig(
            kind=args.topology,
            link_gbit=args.link_gbit,
            latency_us=args.latency_us,
            ranks_per_node=args.ranks_per_node,
            node_gbit=args.node_gbit,
            flops=args.flops,
        )
        return wire_up(topology, ranks=tuple(range(args.ranks)), world_size=args.ranks)
    except (ConfigError, LayoutError) as error:
        raise ConfigError(_FIELD.sub(_option, str(error))) from error


def _option(field: "re.Match[str]") -> str:
    """`parallel.topology.link_gbit=0` as `--link-gbit 0`."""
    name = "topology" if field[1] == "kind" else field[1].replace("_", "-")
    return f"--{name} " if field[2] else f"--{name}"


def _as_json(choice: Choice, wiring: Wiring) -> dict[str, Any]:
    return {
        "forward": choice.forward,
        "backward": choice.backward,
        "why": choice.why,
        "topology": wiring.topology.kind,
        "passes": {
            name: [_cost_as_json(cost, wiring) for cost in costs]
            for name, costs in (
                ("forward", choice.forward_costs),
                ("backward", choice.backward_costs),
            )
        },
    }


def _cost_as_json(cost: PassCost, wiring: Wiring) -> dict[str, Any]:
    return {
        "schedule": cost.schedule,
        "time_s": cost.time_s,
        "compute_s": cost.compute_s,
        "busiest_link": cost.busiest_link,
        "busiest_bytes": cost.busiest_bytes,
        "links": {
            wiring.link_name(link): moved
            for link, moved in zip(cost.links.tolist(), cost.link_bytes.tolist(), strict=True)
        },
        "sent_bytes_per_rank": int(cost.sent_bytes.max()),
        "total_bytes": cost.total_bytes,
        "memory_bytes": cost.memory_bytes,
        "communicators": cost.communicators,
        "ring_steps": cost.ring_steps,
        "peers": cost.peers,
    }


def _headline(shape: Shape, sharding: Sharding, wiring: Wiring) -> str:
    topology = wiring.topology
    return (
        f"{sharding.seq_len:,} tokens over {sharding.world_size:,} ranks ({sharding.layout}, "
        f"{sharding.local_len:,} each), {shape.heads} query heads to {shape.kv_heads} K/V, "
        f"{topology.kind} of {topology.link_gbit:g} Gbit/s"
    )


def _lines(choice: Choice) -> list[str]:
    head = (
        f"{'':12}{'time':>10}{'compute':>10}{'busiest link':>26}{'most sent':>12}"
        f"{'memory':>12}{'steps':>7}{'peers':>7}"
    )
    lines = []
    for name, picked, costs in (
        ("forward", choice.forward, choice.forward_costs),
        ("backward", choice.backward, choice.backward_costs),
    ):
        lines += ["", name + head[len(name) :]]
        lines += [_row(cost, picked=cost.schedule == picked) for cost in costs]
    lines += ["", f"auto: {choice.forward} forward, {choice.backward} backward"]
    return [*lines, *(f"  {reason}" for reason in choice.why.split("; "))]


def _row(cost: PassCost, *, picked: bool) -> str:
    busiest = "-"
    if cost.busiest_link is not None:
        busiest = f"{_bytes(cost.busiest_bytes)} {cost.busiest_link}"
    return (
        f"{'*' if picked else ' '} {cost.schedule:10}{_seconds(cost.time_s):>10}"
        f"{_seconds(cost.compute_s):>10}{busiest:>26}{_bytes(int(cost.sent_bytes.max())):>12}"
        f"{_bytes(cost.memory_bytes):>12}{cost.ring_steps:>7,}{cost.peers:>7,}"
    )


def _seconds(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.2f} {unit}"
    return f"{seconds * 1e6:,.1f} us"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if size >= 100 or unit == "B" else f"{size:,.1f} {unit}"
