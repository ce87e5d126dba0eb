"""Writes the computed tables of docs/ring_attention.md (`--check`: only compare).

One idea: the page quotes the cost function, so its numbers come out of it, and a closed form stands
there only when it agrees. A table replaces what is between `<!-- table: NAME -->` and the next
`<!-- end -->`.
"""

import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch

from ringctx.config import TopologyConfig, TopologyKind
from ringctx.launch import cli
from ringctx.parallel.cost import SCHEDULES, choose, pass_cost, route_of_pass
from ringctx.parallel.layout import LAYOUTS, Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.render_route import render_route
from ringctx.parallel.topology import Wiring, wire_up
from ringctx.parallel.traffic import Shape

PAGE = Path(__file__).parent / "ring_attention.md"
RANKS, RANKS_PER_NODE = 8, 4
KINDS: tuple[TopologyKind, ...] = ("switch", "fully_connected", "cables", "two_level")
MHA = Shape(heads=32, kv_heads=32, head_dim=128)
GQA = Shape(heads=32, kv_heads=4, head_dim=128)
# Few tokens on slow links: transfers take longer than compute.
SHORT_LEN, SLOW_GBIT = 32 * 1024, 25.0


def main(arguments: list[str]) -> int:
    """Write or compare the page; 1 if it is out of date."""
    text = PAGE.read_text()
    current = with_tables(text)
    if "--check" not in arguments:
        PAGE.write_text(current)
        return 0
    if current != text:
        sys.stderr.write(f"{PAGE.name} is out of date: python docs/ring_tables.py\n")
    return int(current != text)


def with_tables(text: str) -> str:
    """The page with each table made anew."""

    def table(match: re.Match[str]) -> str:
        lines = "\n".join(TABLES[match[1]]())
        return f"<!-- table: {match[1]} -->\n{lines}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def closed_forms() -> list[str]:
    """Bytes on the busiest link, forward, when every token sees every other."""
    lines = _head("schedule", *(_named(kind) for kind in KINDS))
    for schedule, forms in FORMS.items():
        for kind, form in zip(KINDS, forms, strict=True):
            _check(schedule, kind, form)
        lines.append(_row(f"`{schedule}`", *(f"`{form.text}`" for form in forms)))
    return lines


@dataclass(frozen=True)
class Form:
    """A formula of P ranks, n of them on a node, and the bytes of one shard's pieces."""

    text: str
    value: Callable[[int, int, int, int, int, int], float]


# P ranks, n a node; kv, q: of one shard; r: its out and lse in the input's dtype, R: in fp32.
_AROUND = Form("(P-1) kv", lambda P, n, kv, q, r, R: (P - 1) * kv)
_HALF_AROUND = Form("(P-1)/2 kv", lambda P, n, kv, q, r, R: (P - 1) / 2 * kv)
FORMS = {
    "one_way": (_AROUND, _AROUND, _AROUND, _AROUND),
    "two_way": (
        _AROUND,
        _HALF_AROUND,
        _HALF_AROUND,
        Form("(P-n) kv", lambda P, n, kv, q, r, R: (P - n) * kv),
    ),
    "token_ring": (
        Form("(P-1) (q+r)", lambda P, n, kv, q, r, R: (P - 1) * (q + r)),
        Form("(P-1) q + r", lambda P, n, kv, q, r, R: (P - 1) * q + r),
        Form("(P-1)/2 (q+R)", lambda P, n, kv, q, r, R: (P - 1) / 2 * (q + R)),
        Form("(P-1) q + n (P-n) r", lambda P, n, kv, q, r, R: (P - 1) * q + n * (P - n) * r),
    ),
    "all_gather": (
        _AROUND,
        Form("kv", lambda P, n, kv, q, r, R: kv),
        Form("P (P+2)/8 kv", lambda P, n, kv, q, r, R: P * (P + 2) / 8 * kv),
        Form("n (P-n) kv", lambda P, n, kv, q, r, R: n * (P - n) * kv),
    ),
}


def _check(schedule: str, kind: TopologyKind, form: Form) -> None:
    for ranks in (4, 8, 16):
        for shape in (MHA, GQA):
            sharding = Sharding(1024 * ranks, ranks, "zigzag")
            found = pass_cost(
                schedule,
                backward=False,
                shape=shape,
                sharding=sharding,
                mask=Mask(causal=False),
                wiring=_wiring(kind, ranks=ranks, node=ranks // 2),
            ).busiest_bytes
            per_token = (
                shape.guest_bytes("kv", backward=False),
                shape.guest_bytes("q", backward=False),
                shape.result_bytes("q", "direct", backward=False),
                shape.result_bytes("q", "carried", backward=False),
            )
            sizes = (sharding.local_len * size for size in per_token)
            expected = form.value(ranks, ranks // 2, *sizes)
            if found != expected:
                raise AssertionError((schedule, kind, ranks, form.text, found, expected))


def busiest_links() -> list[str]:
    """The same, causal, and backward, in numbers."""
    lines = _head("MHA, causal, zigzag", *(_named(kind) for kind in KINDS))
    sharding = Sharding(SHORT_LEN, RANKS, "zigzag")
    unit = sharding.local_len * MHA.guest_bytes("kv", backward=False)
    for backward in (False, True):
        for schedule in SCHEDULES:
            loads = [
                pass_cost(
                    schedule,
                    backward=backward,
                    shape=MHA,
                    sharding=sharding,
                    mask=Mask(),
                    wiring=_wiring(kind),
                ).busiest_bytes
                / unit
                for kind in KINDS
            ]
            name = f"`{schedule}` {'backward' if backward else 'forward'}"
            lines.append(_row(name, *(f"{load:.2f}" for load in loads)))
    return lines


def winners() -> list[str]:
    """What `auto` takes where transfers decide, and its time over one_way's."""
    passes = ("MHA forward", "MHA backward", "GQA 8:1 forward", "GQA 8:1 backward")
    lines = _head("topology", *passes)
    for kind in KINDS:
        cells = [cell for shape in (MHA, GQA) for cell in _choices(shape, kind, SHORT_LEN)]
        lines.append(_row(_named(kind), *cells))
    return lines


def _choices(shape: Shape, kind: TopologyKind, seq_len: int) -> list[str]:
    choice = choose(
        shape=shape,
        sharding=Sharding(seq_len, RANKS, "zigzag"),
        mask=Mask(),
        wiring=_wiring(kind, gbit=SLOW_GBIT),
    )
    cells = []
    for name, costs in (
        (choice.forward, choice.forward_costs),
        (choice.backward, choice.backward_costs),
    ):
        by_name = {cost.schedule: cost.time_s for cost in costs}
        cells.append(f"`{name}` {by_name[name] / by_name['one_way']:.2f}")
    return cells


def pruned() -> list[str]:
    """Bytes of all ranks, as a share of every shard to everybody."""
    length = SHORT_LEN
    masks = {
        "every token sees every other": Mask(causal=False),
        "causal": Mask(),
        "window of 1/16": Mask(window=length // 16),
        "window of 1/16, 4 sinks": Mask(window=length // 16, sinks=4),
        "32 documents of one length": Mask(cu_seqlens=tuple(range(0, length + 1, length // 32))),
        "3 documents of one length": Mask(cu_seqlens=(0, length // 3, 2 * length // 3, length)),
    }
    lines = _head("mask", *LAYOUTS)
    everything = (RANKS - 1) * length * GQA.guest_bytes("kv", backward=False)
    for name, mask in masks.items():
        cells = []
        for layout in LAYOUTS:
            cost = pass_cost(
                "all_gather",
                backward=False,
                shape=GQA,
                sharding=Sharding(length, RANKS, layout),
                mask=mask,
                wiring=_wiring("switch"),
            )
            cells.append(f"{cost.total_bytes / everything:.1%}")
        lines.append(_row(name, *cells))
    return lines


def weights() -> list[str]:
    """Bytes per token of each kind of traffic, for a usual model."""
    lines = _head("bytes per token, bf16", "forward, out", "home", "backward, out", "home")
    for name, shape in (("MHA, 32 heads of 128", MHA), ("GQA, 32 : 4 heads of 128", GQA)):
        assert shape.dtype is torch.bfloat16
        for travels, way, label in (
            ("kv", "carried", "K/V"),
            ("q", "direct", "Q, results straight home"),
            ("q", "carried", "Q, results carried along"),
        ):
            cells = []
            for backward in (False, True):
                cells.append(shape.guest_bytes(travels, backward=backward))  # type: ignore[arg-type]
                cells.append(shape.result_bytes(travels, way, backward=backward))  # type: ignore[arg-type]
            lines.append(
                _row(f"{name}: {label}", *(f"{cell:,}" if cell else "-" for cell in cells))
            )
    return lines


def route() -> list[str]:
    """A route as text."""
    sharding = Sharding(64, 4, "zigzag")
    table = route_of_pass(
        "two_way",
        backward=False,
        shape=MHA,
        sharding=sharding,
        mask=Mask(),
        wiring=_wiring("cables", ranks=4),
    )
    return ["```", *render_route(table, world_size=4).splitlines(), "```"]


def plan() -> list[str]:
    """What the command prints."""
    arguments = f"--seq-len 32k --heads 32 --ranks 8 --topology cables --link-gbit {SLOW_GBIT:g}"
    command = ["plan", "attention", *arguments.split()]
    printed = StringIO()
    with redirect_stdout(printed):
        cli.main(command)
    return ["```", f"$ ringctx {' '.join(command)}", *printed.getvalue().splitlines(), "```"]


def _wiring(
    kind: TopologyKind, *, ranks: int = RANKS, node: int = RANKS_PER_NODE, gbit: float = 400.0
) -> Wiring:
    per_node = node if kind == "two_level" else None
    topology = TopologyConfig(kind=kind, ranks_per_node=per_node, link_gbit=gbit)
    return wire_up(topology, ranks=tuple(range(ranks)), world_size=ranks)


def _named(kind: str) -> str:
    return kind.replace("_", " ")


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


TABLES = {
    "weights": weights,
    "closed_forms": closed_forms,
    "busiest_links": busiest_links,
    "winners": winners,
    "pruned": pruned,
    "route": route,
    "plan": plan,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
