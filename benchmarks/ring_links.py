"""Ring attention's schedules, and other libraries, side by side on a slow network, as JSON.

    python benchmarks/ring_links.py --kind cables --schedules one_way,two_way,auto --full
    python benchmarks/ring_links.py --peers torch_alltoall,yunchang,deepspeed   (peers/install.sh)

The ranks are started once, each on a host of its own (`netlab.py`), and run the variants in turn,
every other round in reverse order. A run takes as long as its slowest rank. Ratios are paired: of
the same round, the first variant's time over this one's, so above 1 is faster than the first.

With `--compute emulated` kernels sleep (`emulated_kernels.py`): schedules are compared with real
bytes and a device that needs no CPU. With `--compute real` all ranks share this machine's cores.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from netlab import add_lab_arguments, lab_topology, open_lab
from netlab_wires import LabError
from ring_links_rank import DTYPES

from ringctx.config import Layout, Schedule, TopologyConfig
from ringctx.parallel.cost import choose
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.topology import wire_up
from ringctx.parallel.traffic import Shape

__all__ = ["summary"]

_FOLDER = Path(__file__).resolve().parent
# one_way_everywhere: whole shards to all ranks, as peers send them, whatever the mask.
_OURS = (*get_args(Schedule), "one_way_everywhere", "ulysses")


def main() -> int:
    """Print the comparison, as JSON."""
    args = _arguments()
    claims = {"latency_us": 200.0, "flops": args.gflops * 1e9}
    # Inside a host nothing is shaped.
    claims |= {"node_gbit": 20.0} if args.kind == "two_level" else {}
    topology = lab_topology(args, **claims)
    settings = vars(args) | {"topology": asdict(topology)}
    try:
        with open_lab(topology, num_hosts=args.hosts) as lab:
            ranks = lab.run(
                _FOLDER / "ring_links_rank.py",
                "measure",
                settings,
                threads=args.threads,
                timeout_s=args.timeout_s,
                python=str(args.peers_python) if args.peers else sys.executable,
            )
    except LabError as error:
        print(f"ring_links: {error}", file=sys.stderr)
        return 1
    config = {
        "topology": asdict(topology),
        "hosts": args.hosts,
        "ranks": len(ranks),
        "threads_per_rank": args.threads,
        "cpu_count": os.cpu_count(),
        "batch": 1,
        **{name: settings[name] for name in _REPORTED},
        "emulated_gflops": args.gflops if args.compute == "emulated" else None,
    }
    variants = summary(ranks)
    for name, predicted in _predicted(settings, topology, num_ranks=len(ranks)).items():
        variants[name] |= predicted
    print(json.dumps({"config": config, "variants": variants}, indent=2))
    return 0


def _predicted(
    settings: dict[str, Any], topology: TopologyConfig, *, num_ranks: int
) -> dict[str, dict[str, Any]]:
    """What the cost function says of each schedule of ours, and what auto chooses."""
    sharding = Sharding(settings["seq_len"], num_ranks, settings["layout"])
    mask = Mask.checked(
        causal=settings["causal"],
        window=settings["window"],
        sinks=0,
        cu_seqlens=None,
        seq_len=sharding.seq_len,
    )
    heads = {name: settings[name] for name in ("heads", "kv_heads", "head_dim")}
    shape = Shape(**heads, dtype=DTYPES[settings["dtype"]])
    wiring = wire_up(topology, ranks=tuple(range(num_ranks)), world_size=num_ranks)
    choice = choose(shape=shape, sharding=sharding, mask=mask, wiring=wiring)
    forward = {cost.schedule: cost.time_s for cost in choice.forward_costs}
    backward = {cost.schedule: cost.time_s for cost in choice.backward_costs}
    chosen = {name: (name, name) for name in forward} | {"auto": (choice.forward, choice.backward)}
    rows: dict[str, dict[str, Any]] = {
        name: {
            "predicted_forward_s": round(forward[first], 4),
            "predicted_total_s": round(
                forward[first] + (backward[second] if settings["passes"] == "both" else 0.0), 4
            ),
        }
        for name, (first, second) in chosen.items()
        if name in settings["schedules"]
    }
    if "auto" in rows:
        rows["auto"] |= {"chose": [choice.forward, choice.backward], "why": choice.why}
    return rows


_REPORTED = (
    "link_mbit",
    "seq_len",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
    "layout",
    "causal",
    "window",
    "passes",
    "compute",
    "rounds",
)


def summary(ranks: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Join what the ranks measured; the first variant is what the ratios compare with.

    Args:
        ranks: for each rank what `ring_links_rank.measure` returned.
    """
    slowest = {
        name: {
            key: [max(values) for values in zip(*(rank[name][key] for rank in ranks), strict=True)]
            for key in ("forward_s", "total_s", "exposed_s")
        }
        for name in ranks[0]
    }
    first = next(iter(slowest.values()))
    return {
        name: {
            **{key: _spread(values) for key, values in times.items()},
            "speedup_forward": _ratio(first["forward_s"], times["forward_s"]),
            "speedup_total": _ratio(first["total_s"], times["total_s"]),
            "sent_bytes": {
                f"{src}->{dst}": count
                for src, rank in enumerate(ranks)
                for dst, count in rank[name]["sent"].items()
            },
            # Packets on each host's wires, by its first rank: headers and forwarded ones included.
            "busiest_wire_bytes": max(max(rank[name]["wire"].values()) for rank in ranks),
            "max_error": _largest([rank[name]["max_error"] for rank in ranks]),
        }
        for name, times in slowest.items()
    }


def _ratio(first: list[float], other: list[float]) -> dict[str, float]:
    return _spread([x / y for x, y in zip(first, other, strict=True)])


def _spread(values: list[float]) -> dict[str, float]:
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in spread.items()}


def _largest(errors: list[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return max(known) if known else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_lab_arguments(parser, link_mbit=50)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--layout", choices=get_args(Layout), default="zigzag")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--full", dest="causal", action="store_false", help="as --no-causal")
    parser.add_argument("--window", type=int, help="tokens that a causal query sees")
    parser.add_argument("--passes", choices=["forward", "both"], default="forward")
    parser.add_argument("--schedules", type=_names(_OURS), default=["one_way", "two_way"])
    parser.add_argument("--peers", type=_names(_PEERS), default=[])
    parser.add_argument(
        "--peers-python", type=Path, default=_FOLDER / "peers" / ".venv" / "bin" / "python"
    )
    parser.add_argument("--compute", choices=["real", "emulated"], default="real")
    parser.add_argument("--gflops", type=float, default=40.0, help="of a rank's kernels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--timeout-s", type=float, default=550)
    args = parser.parse_args()
    if args.peers and (args.window is not None or args.compute == "emulated"):
        parser.error("--peers have no window, and no kernels but real ones")
    if args.peers and not args.peers_python.exists():
        parser.error(f"--peers need {args.peers_python}; benchmarks/peers/install.sh makes it")
    args.peers_python = str(args.peers_python)
    return args


_PEERS = ("torch_alltoall", "torch_allgather", "yunchang", "deepspeed")


def _names(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
