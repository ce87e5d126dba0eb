"""What the links of a lab carry, measured from inside by its ranks."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["probe", "settle", "wire_bytes"]


def probe(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """On every rank: do each set of transfers at one time, one set after the other.

    Args:
        settings: `sets`, each a list of (src, dst) ranks; `message_bytes` of every transfer.

    Returns:
        For each set: `seconds` {src: until its message was here}, and `sent` {interface: bytes}.
    """
    return [_transfer(pairs, settings["message_bytes"]) for pairs in settings["sets"]]


def settle() -> None:
    """Wait for all ranks."""
    dist.all_reduce(torch.zeros(1))


def wire_bytes() -> dict[str, int]:
    """Bytes that left this host by each interface since it was made, headers included."""
    interfaces = Path("/sys/class/net")
    return {
        path.name: int((path / "statistics" / "tx_bytes").read_text())
        for path in sorted(interfaces.iterdir())
        if path.name.startswith("to")
    }


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is in no group"
    return work


def _transfer(pairs: list[list[int]], message_bytes: int) -> dict[str, Any]:
    rank = dist.get_rank()
    sources = [src for src, dst in pairs if dst == rank]
    message = torch.zeros(message_bytes, dtype=torch.uint8)
    buffers = {src: torch.empty_like(message) for src in sources}
    before = wire_bytes()
    settle()
    start_s = time.perf_counter()
    # Receives first: gloo announces them on the wire that the sends fill.
    receives = {src: _started(dist.irecv(buffers[src], src)) for src in sources}
    sends = [_started(dist.isend(message, dst)) for src, dst in pairs if src == rank]
    seconds = {}
    for src, receive in receives.items():
        receive.wait()
        seconds[src] = time.perf_counter() - start_s
    for send in sends:
        send.wait()
    settle()
    after = wire_bytes()
    return {"seconds": seconds, "sent": {name: after[name] - before[name] for name in after}}
