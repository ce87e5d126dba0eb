"""Lightning attention over ranks: against one process, and on a slow network, as JSON.

    python benchmarks/lightning_links.py [--hosts 2,4] [--link-mbit 100] [--tokens 16k] [--rounds 7]
    python benchmarks/lightning_links.py --quick       loopback alone, small, in seconds

`loopback`: two ranks of one thread that share `--tokens` against one thread with all of them and
the other core idle; nothing is shaped, so only work counts. `target_ratio` is the time of the
slowest rank over half the serial time of the same round, `on_core_ratio` the same without the
seconds in which a process was ready and others had the cores; `no_exchange` are two processes that
do not talk, the best that the machine gives.
`links`: every host a network namespace on a shaped switch (`netlab.py`, needs root), `--tokens` a
rank, every exchange in both layouts beside a trade of tokens for heads (`head_split`, as Megatron
does for state-space layers). `alone_s` is an exchange without work, both directions; `hidden` is
1 - exposed / alone, each of its slowest rank, by round; `bytes_match` compares the ledger with
the formula of `state_cost.py`. All ranks share this machine's cores: work takes longer, and hides
more, than on a core each, but a rank also waits for a peer that has no core (`queued_s`).
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning_links_rank
import torch
import torch.distributed as dist
from lightning_links_rank import HEAD_SPLIT, NO_EXCHANGE
from netlab import open_lab
from netlab_wires import LabError
from torch.multiprocessing.spawn import spawn

from ringctx.config import TopologyConfig
from ringctx.config_file import parse_size
from ringctx.parallel.layout import Sharding
from ringctx.parallel.parts import chain_of
from ringctx.parallel.state_cost import StateShape, exchange_cost
from ringctx.parallel.topology import wire_up

__all__ = ["compare_links", "compare_speed", "main"]

_FOLDER = Path(__file__).resolve().parent
_REAL = {
    "compute": "real, one thread a rank; all ranks share the cores",
    "bytes": "real, gloo over TCP",
    "loopback": "unshaped",
    "links": "shaped by tc tbf in each direction; 64 kB pass unshaped at first",
}
_QUICK = {"tokens": 256, "heads": 2, "head_dim": 16, "rounds": 1, "head_split_rounds": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison, as JSON."""
    args = _arguments(arguments)
    settings: dict[str, Any] = {"exchanges": ["all_gather", "ring"]}
    settings |= {"layouts": ["zigzag", "contiguous"]}
    names = ("heads", "head_dim", "rounds", "head_split_rounds")
    settings |= {"tokens": parse_size(args.tokens)} | {name: getattr(args, name) for name in names}
    settings |= _QUICK if args.quick else {}
    result: dict[str, Any] = {
        "config": {
            **settings,
            "link_mbit": args.link_mbit,
            "dtype": "fp32",
            "cpu_count": os.cpu_count(),
            "torch": torch.__version__,
            "real": _REAL,
        }
    }
    try:
        with _machine(result):
            if args.quick:
                fast, found = _on_loopback(("speed", "links"), settings)
                result["loopback"] = compare_speed(fast)
                result["links"] = {"2": compare_links(found, settings, TopologyConfig())}
            elif "loopback" in args.parts:
                result["loopback"] = compare_speed(*_on_loopback(("speed",), settings))
            if "links" in args.parts and not args.quick:
                result["links"] = {
                    str(hosts): _on_links(hosts, settings, args) for hosts in args.hosts
                }
    except LabError as error:
        print(f"lightning_links: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2))
    return 0


def compare_speed(ranks: list[dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """Ratios to the serial time divided by the ranks, of the same round.

    Args:
        ranks: for each rank what `lightning_links_rank.speed` returned.
    """
    size, serial = len(ranks), {key: xs for key, (xs,) in _by_rank(ranks[:1], "serial").items()}
    result: dict[str, Any] = {"serial": {key: _spread(xs) for key, xs in serial.items()}}
    for name in ranks[1]:
        times = _by_rank(ranks, name)
        slowest = {key: [max(xs) for xs in zip(*times[key], strict=True)] for key in times}
        cpu_s = [sum(xs) for xs in zip(*times["cpu_s"], strict=True)]
        result[name] = {
            "total_s": _spread(slowest["total_s"]),
            "on_core_s": _spread(slowest["on_core_s"]),
            "cpu_s_of_all": _spread(cpu_s),
            "cpu_ratio": _spread([x / y for x, y in zip(cpu_s, serial["cpu_s"], strict=True)]),
        }
        for ratio, key in (("target_ratio", "total_s"), ("on_core_ratio", "on_core_s")):
            pairs = zip(slowest[key], serial[key], strict=True)
            result[name][ratio] = _spread([size * x / y for x, y in pairs])
    return result


def _by_rank(
    ranks: list[dict[str, dict[str, list[float]]]], name: str
) -> dict[str, list[list[float]]]:
    """Seconds of one variant, [ranks][rounds] by kind; on a core: those not spent in its queue."""
    rows = [rank[name] for rank in ranks]
    return {
        "total_s": [row["total_s"] for row in rows],
        "on_core_s": [
            [x - y for x, y in zip(row["total_s"], row["queued_s"], strict=True)] for row in rows
        ],
        "cpu_s": [row["cpu_s"] for row in rows],
    }


def compare_links(
    ranks: list[dict[str, dict[str, Any]]], settings: dict[str, Any], topology: TopologyConfig
) -> dict[str, Any]:
    """What each variant took, moved and hid.

    Args:
        ranks: for each rank what `lightning_links_rank.links` returned.
        settings: of the measurement.
        topology: of the links.
    """
    result = {}
    for name in ranks[0]:
        columns = [rank[name] for rank in ranks]
        slowest = {
            key: [max(values) for values in zip(*(c[key] for c in columns), strict=True)]
            for key in ("total_s", "queued_s", "exposed_s", "alone_s")
            if key in columns[0]
        }
        row: dict[str, Any] = {key: _spread(values) for key, values in slowest.items()}
        if "alone_s" in slowest:
            shares = zip(slowest["exposed_s"], slowest["alone_s"], strict=True)
            row["hidden"] = _spread([1 - exposed / alone for exposed, alone in shares])
        sent = [sum(column["sent"].values()) for column in columns]
        formula = _formula(name, settings, topology, num_ranks=len(ranks))
        row["cpu_s_of_all"] = _spread(
            [sum(xs) for xs in zip(*(c["cpu_s"] for c in columns), strict=True)]
        )
        row |= {"sent_bytes": sent, "formula_bytes": formula, "bytes_match": sent == formula}
        # Packets, with headers and what the transfers' own bookkeeping sends.
        row["wire_bytes"] = [sum(column["wire"].values()) for column in columns]
        row["max_error"] = None
        if name != NO_EXCHANGE:
            row["max_error"] = max(column["max_error"] for column in columns)
        result[name] = row
    return result


def _formula(
    name: str, settings: dict[str, Any], topology: TopologyConfig, *, num_ranks: int
) -> list[int]:
    """Bytes that each rank sends, forward and backward."""
    tokens, heads, dim = (settings[key] for key in ("tokens", "heads", "head_dim"))
    if name == NO_EXCHANGE:
        return [0] * num_ranks
    if name == HEAD_SPLIT:
        # q, k, v and out, and the gradient of each: the heads of every other rank.
        return [8 * (num_ranks - 1) * tokens * (heads // num_ranks) * dim * 4] * num_ranks
    method, layout = name.split()
    costs = [
        exchange_cost(
            method,
            backward=backward,
            shape=StateShape(heads=heads, key_dim=dim, value_dim=dim),
            chain=chain_of(Sharding(tokens * num_ranks, num_ranks, layout), None),
            wiring=wire_up(topology, ranks=tuple(range(num_ranks)), world_size=num_ranks),
        )
        for backward in (False, True)
    ]
    return [int(x) for x in costs[0].sent_bytes + costs[1].sent_bytes]


def _on_links(hosts: int, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    topology = TopologyConfig(kind="switch", link_gbit=args.link_mbit / 1e3)
    with open_lab(topology, num_hosts=hosts) as lab:
        script = _FOLDER / "lightning_links_rank.py"
        ranks = lab.run(script, "links", settings, timeout_s=args.timeout_s)
    return compare_links(ranks, settings, topology)


def _on_loopback(functions: tuple[str, ...], settings: dict[str, Any]) -> list[list[Any]]:
    """What functions of `lightning_links_rank` return on each of two ranks, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder, functions, settings), nprocs=2)
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
    return [list(found) for found in zip(*ranks, strict=True)]


def _rank(rank: int, folder: str, functions: tuple[str, ...], settings: dict[str, Any]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = [getattr(lightning_links_rank, function)(settings) for function in functions]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def _machine(result: dict[str, Any]) -> Iterator[None]:
    """Note how many cores others used meanwhile."""
    start_s, busy_s, own_s = time.monotonic(), _busy_s(), _own_s()
    yield
    wall_s = time.monotonic() - start_s
    others = (_busy_s() - busy_s - (_own_s() - own_s)) / wall_s
    result["machine"] = {"wall_s": round(wall_s, 1), "cores_of_others": round(others, 2)}
    result["machine"]["load_average"] = [round(x, 2) for x in os.getloadavg()]


def _busy_s() -> float:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    # All but idle and iowait.
    ticks = sum(map(int, fields[:8])) - int(fields[3]) - int(fields[4])
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _spread(values: list[float]) -> dict[str, float]:
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in spread.items()}


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="loopback alone, tiny sizes")
    parser.add_argument("--parts", type=_parts, default=["loopback", "links"])
    parser.add_argument(
        "--hosts", type=lambda text: [int(n) for n in text.split(",")], default=[2, 4]
    )
    parser.add_argument("--link-mbit", type=float, default=100, help="in each direction")
    parser.add_argument("--tokens", default="16k", help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--head-split-rounds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=550)
    return parser.parse_args(arguments)


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if set(names) - {"loopback", "links"}:
        raise argparse.ArgumentTypeError(f"{text} names more than loopback, links")
    return names


if __name__ == "__main__":
    sys.exit(main())
