"""The lab's wiring and routes as pure functions, and a real one where this machine can build it."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from netlab import open_lab
from netlab_check import follow, message_sets
from netlab_wires import SWITCH, LabError, Network, missing, remove_leftovers, route, wires

from ringctx.config import TopologyConfig

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

# Prints when its network is up, and waits to be stopped.
OPEN_AND_WAIT = """
import time
from netlab import open_lab
from ringctx.config import TopologyConfig
with open_lab(TopologyConfig(kind="cables", link_gbit=0.1), num_hosts=3):
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def network_tools() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(f"no network can be built here: {reason}")


def test_two_hosts_share_one_cable() -> None:
    assert wires("cables", 2) == ((0, 1),)
    assert wires("cables", 3) == ((0, 1), (1, 2), (2, 0))


@pytest.mark.parametrize("num_hosts", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["cables", "fully_connected"])
def test_every_hop_of_a_route_has_a_wire(kind: str, num_hosts: int) -> None:
    pairs = {frozenset(pair) for pair in wires(kind, num_hosts)}  # type: ignore[arg-type]
    for src, dst in itertools.permutations(range(num_hosts), 2):
        way = route(kind, num_hosts, src, dst)  # type: ignore[arg-type]
        assert (way[0], way[-1]) == (src, dst)
        assert all(frozenset(hop) in pairs for hop in itertools.pairwise(way))


@pytest.mark.parametrize("num_hosts", [3, 4, 5, 8])
def test_cables_go_by_the_shorter_way(num_hosts: int) -> None:
    for src, dst in itertools.permutations(range(num_hosts), 2):
        distance = min((dst - src) % num_hosts, (src - dst) % num_hosts)
        assert len(route("cables", num_hosts, src, dst)) == distance + 1


def test_a_switch_has_one_port_per_host() -> None:
    assert wires("switch", 3) == ((0, SWITCH), (1, SWITCH), (2, SWITCH))
    assert wires("two_level", 2) == ((0, SWITCH), (1, SWITCH))


@pytest.mark.parametrize("kind", ["cables", "fully_connected"])
def test_the_check_fills_every_wire_in_both_directions(kind: str) -> None:
    sets = message_sets(kind, 4)  # type: ignore[arg-type]
    both = {(a, b) for pair in wires(kind, 4) for a, b in (pair, pair[::-1])}  # type: ignore[arg-type]
    assert set(sets["all"]) == both
    assert both <= {pairs[0] for pairs in sets.values() if len(pairs) == 1}


def test_the_path_is_read_off_the_counters() -> None:
    sent = [{"to1": 1050, "to3": 20}, {"to2": 1050, "to0": 20}, {"to1": 20, "to3": 0}, {}]
    assert follow(0, sent, message_bytes=1000) == [0, 1, 2]


def test_one_host_is_refused() -> None:
    with pytest.raises(LabError, match="num_hosts=1"):
        Network(TopologyConfig(kind="switch"), 1)


@pytest.mark.slow
@pytest.mark.usefixtures("network_tools")
def test_links_carry_their_rate_and_no_more_and_strangers_talk_by_way_of_neighbours() -> None:
    command = [sys.executable, str(BENCHMARKS / "netlab.py"), "check", "--kind", "cables"]
    command += ["--hosts", "4", "--link-mbit", "50", "--seconds", "0.4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout)
    # A burst passes unshaped; a busy machine is slower than the link.
    shares = result["slowest_share_of_rate"].values()
    assert max(shares) < 1.05
    assert min(shares) > 0.4
    assert result["routes"]["0->2"] == {"expected": [0, 1, 2], "seen": [0, 1, 2]}
    assert all(way["expected"] == way["seen"] for way in result["routes"].values())


@pytest.mark.usefixtures("network_tools")
def test_a_failing_rank_is_quoted_and_the_network_goes_away(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("def fail(settings):\n    raise ValueError(settings['word'])\n")
    topology = TopologyConfig(kind="switch", link_gbit=0.1)
    with (
        pytest.raises(LabError, match="ValueError: walrus"),
        open_lab(topology, num_hosts=2) as lab,
    ):
        name = lab.network.namespace(0)
        assert name in _namespaces()
        lab.run(script, "fail", {"word": "walrus"}, timeout_s=60)
    assert name not in _namespaces()


@pytest.mark.usefixtures("network_tools")
def test_sigterm_removes_the_network() -> None:
    process = _open_and_wait()
    assert _namespaces_of(process.pid)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert not _namespaces_of(process.pid)


@pytest.mark.usefixtures("network_tools")
def test_clean_removes_what_a_killed_process_left() -> None:
    process = _open_and_wait()
    left = _namespaces_of(process.pid)
    assert len(left) == 3
    # Not while it lives.
    assert not set(left) & set(remove_leftovers())
    process.kill()
    process.wait()
    assert set(left) <= set(remove_leftovers())
    assert not _namespaces_of(process.pid)


def _open_and_wait() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN_AND_WAIT], cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == "up\n"
    return process


def _namespaces() -> list[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in done.stdout.splitlines()]


def _namespaces_of(pid: int) -> list[str]:
    return [name for name in _namespaces() if name.startswith(f"ringctx-{pid}-")]
