"""Whether a lab's links are what they claim: measured rates and routes against the declared ones.

One idea: sets of messages that are sent at one time, one set after the other, and a share for each:
what a link carried of its rate. Routes are read off the interfaces' own counters.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netlab_ranks import run_ranks
from netlab_wires import SWITCH, Network, route, wires

from ringctx.config import TopologyKind

__all__ = ["check", "follow", "message_sets"]

Pair = tuple[int, int]

# 1448 of the 1514 bytes of a packet are the message's.
_PAYLOAD_SHARE = 1448 / 1514
# A link that carries less than this share of its rate, or more than all of it, is not as declared.
# Single links reach 0.96; below 0.9 the processor was busy with something else.
_WORST_SHARE, _BEST_SHARE = 0.85, 1.0


def message_sets(kind: TopologyKind, num_hosts: int) -> dict[str, list[Pair]]:
    """(src, dst) hosts that send at one time, by name.

    Each link one way and both ways; `all`: every link full in both directions; `shared`: on a
    switch, two messages in and two out of each port; `route`: hosts that have no wire between them.
    """
    switched = SWITCH in wires(kind, num_hosts)[0]
    pairs = list(wires("cables" if switched else kind, num_hosts))
    back = [(b, a) for a, b in pairs]
    sets: dict[str, list[Pair]] = {}
    for a, b in pairs:
        sets |= {f"{a}->{b}": [(a, b)], f"{b}->{a}": [(b, a)], f"{a}<->{b}": [(a, b), (b, a)]}
    if switched and num_hosts > 2:
        sets |= {"all": pairs, "shared": pairs + back}
    else:
        sets["all"] = pairs + back
    hosts = range(num_hosts)
    for src, dst in ((src, dst) for src in hosts for dst in hosts):
        if len(route(kind, num_hosts, src, dst)) > 2:
            sets[f"route {src}->{dst}"] = [(src, dst)]
    return sets


def check(network: Network, *, seconds: float) -> dict[str, Any]:
    """Measure the links of a network that is up, each message for about `seconds`."""
    topology, num_hosts = network.topology, network.num_hosts
    k = topology.ranks_per_node or 1
    rate_bit = topology.link_gbit * 1e9
    sets = message_sets(topology.kind, num_hosts)
    on_ranks = [[(src * k, dst * k) for src, dst in pairs] for pairs in sets.values()]
    inside = [[(0, 1)]] if k > 1 else []
    measured = _Measured(round(rate_bit * seconds / 8), on_ranks + inside)
    measured.run(network, ranks_per_host=k, timeout_s=60 + 10 * seconds * len(sets))
    shares = {
        name: measured.slowest_bit(i) / rate_bit
        for i, name in enumerate(sets)
        if not name.startswith("route ")
    }
    routes = {
        name.removeprefix("route "): {
            "expected": list(route(topology.kind, num_hosts, *pairs[0])),
            "seen": measured.seen(i, pairs[0][0]),
        }
        for i, (name, pairs) in enumerate(sets.items())
        if name.startswith("route ")
    }
    return {
        "kind": topology.kind,
        "hosts": num_hosts,
        "ranks": num_hosts * k,
        "link_mbit": rate_bit / 1e6,
        "message_bytes": measured.message_bytes,
        "mbit": {name: measured.mbit(i) for i, name in enumerate(sets)},
        "inside_host_mbit": measured.mbit(len(sets)) if inside else None,
        "slowest_share_of_rate": {name: round(share, 3) for name, share in shares.items()},
        "largest_possible_share": round(_PAYLOAD_SHARE, 3),
        "routes": routes,
        "ok": all(_WORST_SHARE <= share <= _BEST_SHARE for share in shares.values())
        and all(way["expected"] == way["seen"] for way in routes.values()),
    }


@dataclass
class _Measured:
    """Messages of `message_bytes`, sets of (src, dst) ranks, and what each rank saw of them."""

    message_bytes: int
    sets: list[list[Pair]]
    ranks: list[list[dict[str, Any]]] | None = None

    def run(self, network: Network, *, ranks_per_host: int, timeout_s: float) -> None:
        self.ranks = run_ranks(
            network,
            Path(__file__).with_name("netlab_probe.py"),
            "probe",
            {"sets": self.sets, "message_bytes": self.message_bytes},
            ranks_per_host=ranks_per_host,
            timeout_s=timeout_s,
        )

    def bit(self, index: int) -> dict[Pair, float]:
        """Bit/s of each message of a set."""
        assert self.ranks is not None
        return {
            (src, dst): self.message_bytes * 8 / self.ranks[dst][index]["seconds"][str(src)]
            for src, dst in self.sets[index]
        }

    def mbit(self, index: int) -> dict[str, float]:
        return {f"{a}->{b}": round(bit / 1e6, 1) for (a, b), bit in self.bit(index).items()}

    def slowest_bit(self, index: int) -> float:
        """What the slowest link of a set carried; messages that leave by one port share it."""
        assert self.ranks is not None
        rates = []
        for (src, _), bit in self.bit(index).items():
            one_port = len(self.ranks[src][index]["sent"]) == 1
            messages = sum(src == other for other, _ in self.sets[index])
            rates.append(bit * messages if one_port else bit)
        return min(rates)

    def seen(self, index: int, src: int) -> list[int]:
        assert self.ranks is not None
        sent = [rank[index]["sent"] for rank in self.ranks]
        return follow(src, sent, message_bytes=self.message_bytes)


def follow(src: int, sent: list[dict[str, int]], *, message_bytes: int) -> list[int]:
    """The hosts that one message visited, by what each host's interfaces sent meanwhile."""
    path = [src]
    while len(path) <= len(sent):
        carried = [name for name, count in sent[path[-1]].items() if count > message_bytes / 2]
        if not carried:
            break
        path.append(int(carried[0].removeprefix("to")))
    return path
