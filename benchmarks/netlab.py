"""A slow cluster on one machine: hosts are network namespaces, links are shaped in each direction.

    python benchmarks/netlab.py check --kind cables --hosts 4 --link-mbit 200
    python benchmarks/netlab.py clean       remove what processes that were killed left behind

    with open_lab(TopologyConfig(kind="cables", link_gbit=0.05), num_hosts=4) as lab:
        results = lab.run(Path("script.py"), "function", {"tokens": 4096})     # one per rank

`check` measures each link with gloo messages, one way, both ways, and all links at once, against
the shaped rate, and says which way traffic between hosts without a wire takes. What arrives is at
most 95.6 % of the rate: 1448 of the 1514 bytes of a packet. Needs root, `ip` and `tc`.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from netlab_check import check
from netlab_ranks import run_ranks
from netlab_wires import LabError, Network, missing, remove_leftovers

from ringctx.config import TopologyConfig, TopologyKind

__all__ = ["Lab", "add_lab_arguments", "lab_topology", "open_lab"]


@dataclass(frozen=True)
class Lab:
    """A network that is up."""

    network: Network

    @property
    def topology(self) -> TopologyConfig:
        """As it was opened with."""
        return self.network.topology

    @property
    def ranks_per_host(self) -> int:
        """Ranks on one host talk without going over a wire."""
        return self.topology.ranks_per_node or 1

    def run(
        self,
        script: Path,
        function: str,
        settings: Mapping[str, Any],
        *,
        threads: int = 1,
        timeout_s: float = 300.0,
        python: str = sys.executable,
    ) -> list[Any]:
        """Call `function(settings)` of `script` on all ranks; see `run_ranks`."""
        return run_ranks(
            self.network,
            script.resolve(),
            function,
            settings,
            ranks_per_host=self.ranks_per_host,
            threads=threads,
            timeout_s=timeout_s,
            python=python,
        )


@contextmanager
def open_lab(topology: TopologyConfig, *, num_hosts: int) -> Iterator[Lab]:
    """Build the network, and remove it at the end, also when stopped by Ctrl-C or SIGTERM.

    Args:
        topology: kind and link_gbit are built (two_level: ranks_per_node ranks on each host, which
            talk unshaped); latency, node_gbit and flops are claims that nothing here enforces.
        num_hosts: two or more.

    Raises:
        LabError: if it cannot be built here.
    """
    reason = missing()
    if reason is not None:
        raise LabError(reason)
    network = Network(topology, num_hosts)
    previous = signal.signal(signal.SIGTERM, _exit)
    try:
        network.build()
        yield Lab(network)
    finally:
        network.remove()
        signal.signal(signal.SIGTERM, previous)


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def add_lab_arguments(parser: argparse.ArgumentParser, *, link_mbit: float) -> None:
    """What every program on a lab asks for."""
    parser.add_argument("--kind", choices=get_args(TopologyKind), default="cables")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--ranks-per-host", type=int, default=2, help="two_level only")
    parser.add_argument("--link-mbit", type=float, default=link_mbit, help="in each direction")


def lab_topology(args: argparse.Namespace, **claims: float) -> TopologyConfig:
    """The topology that the arguments name; `claims` are its fields that the lab does not shape."""
    return TopologyConfig(
        kind=args.kind,
        link_gbit=args.link_mbit / 1e3,
        ranks_per_node=args.ranks_per_host if args.kind == "two_level" else None,
        **claims,
    )


def main() -> int:
    """Print what was measured or removed, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("clean", help="remove networks whose process is gone")
    check_parser = commands.add_parser("check", help="build a network and measure its links")
    add_lab_arguments(check_parser, link_mbit=200)
    check_parser.add_argument("--seconds", type=float, default=1.0, help="of each transfer")
    args = parser.parse_args()
    if args.command == "clean":
        print(json.dumps({"removed": remove_leftovers()}))
        return 0
    try:
        with open_lab(lab_topology(args), num_hosts=args.hosts) as lab:
            result = check(lab.network, seconds=args.seconds)
    except LabError as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
