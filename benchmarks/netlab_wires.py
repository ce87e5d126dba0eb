"""A cluster out of network namespaces: who is wired to whom, and the commands that build it.

One idea: a host is a namespace, a wire a veth pair, and `tc tbf` on each of its two ends shapes
what leaves there, so that every link has a rate of its own in each direction. Needs root, `ip` and
`tc`. Delay is not shaped. Wiring and routes are pure functions of the kind and the host numbers.

What the kernel needs to be told:
- reno: bbr and cubic lose a fifth when both directions of a shaped link are full;
- no slow start after idle: it cost a window's short exchange a third of its time;
- one address a host on a device of its own (a veth pair as a stand-in for a dummy) where it has
  several wires, since gloo is given one interface;
- a small burst: what passes unshaped at first must not count.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ringctx.config import TopologyConfig, TopologyKind

__all__ = [
    "SWITCH",
    "LabError",
    "Network",
    "missing",
    "remove_leftovers",
    "route",
    "wires",
]

SWITCH = -1
_PREFIX = "ringctx-"
_SYSCTLS = (
    "net.ipv4.tcp_congestion_control=reno",
    # A wire does not slow down because nobody used it for a while; a connection would.
    "net.ipv4.tcp_slow_start_after_idle=0",
    # What one connection learned about a path must not slow the next one.
    "net.ipv4.tcp_no_metrics_save=1",
    "net.ipv4.ip_forward=1",
    # On cables an answer may come in by another wire than the one a host would send by.
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
    "net.ipv6.conf.all.disable_ipv6=1",
    "net.ipv6.conf.default.disable_ipv6=1",
)


class LabError(RuntimeError):
    """The network cannot be built, or a rank in it failed."""


def wires(kind: TopologyKind, num_hosts: int) -> tuple[tuple[int, int], ...]:
    """Pairs of hosts with a wire between them; SWITCH is the other end of a switch's port."""
    hosts = range(num_hosts)
    if kind == "fully_connected":
        return tuple(itertools.combinations(hosts, 2))
    if kind == "cables":
        # Between two hosts there is one cable, not two.
        return tuple((i, (i + 1) % num_hosts) for i in hosts[: num_hosts if num_hosts > 2 else 1])
    return tuple((i, SWITCH) for i in hosts)


def route(kind: TopologyKind, num_hosts: int, src: int, dst: int) -> tuple[int, ...]:
    """Hosts that a packet visits, both ends included; on cables by the shorter way round."""
    if kind != "cables":
        return (src, dst)
    clockwise = (dst - src) % num_hosts
    hop = 1 if clockwise <= num_hosts - clockwise else -1
    hops = min(clockwise, num_hosts - clockwise)
    return tuple((src + hop * i) % num_hosts for i in range(hops + 1))


def missing() -> str | None:
    """Why no network can be built here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} (iproute2) is not installed"
    name = f"{_PREFIX}{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "add", "name", "a", "type", "veth", "peer", "name", "b")
        _run("tc", "-n", name, "qdisc", "add", "dev", "a", "root", *_tbf(1e6))
        _run("ip", "netns", "exec", name, "sysctl", "-q", "-w", _SYSCTLS[0])
    except LabError as error:
        return str(error)
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None


@dataclass(frozen=True)
class Network:
    """The names of one process's namespaces, and what is done to them."""

    topology: TopologyConfig
    num_hosts: int

    def __post_init__(self) -> None:
        """A single host has no wires."""
        if self.num_hosts < 2:
            raise LabError(f"num_hosts={self.num_hosts} makes no network; use 2 or more")

    def namespace(self, node: int) -> str:
        """Of a host, or of SWITCH."""
        return f"{_PREFIX}{os.getpid()}-{'switch' if node == SWITCH else f'h{node}'}"

    def address(self, host: int) -> str:
        """Of a host, the same whichever wire it is reached by."""
        return f"10.77.0.{host + 1}"

    @property
    def interface(self) -> str:
        """The one that carries a host's address."""
        return _end(SWITCH) if self._switched else "host"

    def build(self) -> None:
        """Create everything; on failure the caller removes what is there."""
        nodes = [*range(self.num_hosts), *([SWITCH] if self._switched else [])]
        for node in nodes:
            _run("ip", "netns", "add", self.namespace(node))
            sysctl = ("sysctl", "-q", "-w", *_SYSCTLS)
            _run("ip", "netns", "exec", self.namespace(node), *sysctl)
        pairs = wires(self.topology.kind, self.num_hosts)
        _batch(["ip"], [self._wire(a, b) for a, b in pairs])
        if self._switched:
            self._connect_switch()
        for host in range(self.num_hosts):
            _batch(["ip", "-n", self.namespace(host)], self._host_commands(host))
        for a, b in pairs:
            self._shape(a, b)
            self._shape(b, a)

    def remove(self) -> None:
        """Kill what runs in the namespaces and delete them; those never made do not matter."""
        _remove(name for name in _namespaces() if name.startswith(f"{_PREFIX}{os.getpid()}-"))

    @property
    def _switched(self) -> bool:
        return self.topology.kind in ("switch", "two_level")

    def _wire(self, a: int, b: int) -> str:
        ends = [f"name {_end(y)} netns {self.namespace(x)}" for x, y in ((a, b), (b, a))]
        return f"link add {ends[0]} type veth peer {ends[1]}"

    def _shape(self, node: int, other: int) -> None:
        tbf = _tbf(self.topology.link_gbit * 1e9)
        end = ("dev", _end(other), "root")
        _run("tc", "-n", self.namespace(node), "qdisc", "add", *end, *tbf)

    def _connect_switch(self) -> None:
        commands = ["link add name bridge type bridge", "link set bridge up"]
        for host in range(self.num_hosts):
            commands.append(f"link set {_end(host)} master bridge up")
        _batch(["ip", "-n", self.namespace(SWITCH)], commands)

    def _host_commands(self, host: int) -> list[str]:
        address = self.address(host)
        if self._switched:
            end = _end(SWITCH)
            return [f"addr add {address}/24 dev {end}", "link set lo up", f"link set {end} up"]
        commands = [
            "link set lo up",
            "link add name host type veth peer name host-peer",
            f"addr add {address}/32 dev host",
            "link set host up",
            "link set host-peer up",
        ]
        others = [other for other in range(self.num_hosts) if other != host]
        paths = {other: route(self.topology.kind, self.num_hosts, host, other) for other in others}
        commands += [f"link set {_end(path[1])} up" for path in paths.values() if len(path) == 2]
        for other, path in paths.items():
            via = f"via {self.address(path[1])} " if len(path) > 2 else ""
            link = "onlink" if via else "scope link"
            source = f"src {address}"
            commands.append(
                f"route add {self.address(other)}/32 {via}dev {_end(path[1])} {source} {link}"
            )
        return commands


def remove_leftovers() -> list[str]:
    """Remove the networks of processes that are gone; returns the names of the namespaces."""
    names = [
        name
        for name in _namespaces()
        if name.startswith(_PREFIX) and not os.path.exists(f"/proc/{name.split('-')[1]}")
    ]
    _remove(names)
    return names


def _end(node: int) -> str:
    """The interface of a wire is called after the node at its other end."""
    return "to-switch" if node == SWITCH else f"to{node}"


def _tbf(rate_bit: float) -> tuple[str, ...]:
    # Packets wait for up to 50 ms; more than that is dropped, and TCP slows down.
    return ("tbf", "rate", f"{rate_bit:.0f}bit", "burst", "64kb", "latency", "50ms")


def _namespaces() -> list[str]:
    lines = _run("ip", "netns", "list").splitlines()
    return [line.split()[0] for line in lines if line]


def _remove(names: Iterable[str]) -> None:
    for name in names:
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for pid in pids.stdout.split():
            subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _batch(command: Sequence[str], lines: Sequence[str]) -> None:
    _run(*command, "-batch", "-", text="\n".join(lines) + "\n")


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)} failed: {done.stderr.strip()}\n{text or ''}".strip())
    return done.stdout
