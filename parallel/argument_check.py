"""Debug mode: ranks compare the arguments of a call before its first transfer.

Ranks that call with different arguments would wait for one another, or abort in the backend, or
compute garbage. With RINGCTX_CHECK=1 in the environment (of all ranks) each tells every other what
it was called with, and all raise the same error. A rank whose own checks fail tells that instead.
Price: one message of 8 KiB to each rank and a wait, per call; not counted in the traffic.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.parallel import comm

__all__ = ["agreed_arguments", "is_checking"]

_VARIABLE = "RINGCTX_CHECK"
# Of one size, so that no difference between ranks is one between message sizes.
_MESSAGE_BYTES = 8192
_LONGEST_VALUE = 160
_LONGEST_ERROR = 2048
# Unlike any tag of an attention call: a rank that does not check is waited for, not misread.
_TAG = 1_000_003
_ERROR = "error"


def is_checking() -> bool:
    """Whether debug mode is on, now."""
    return os.environ.get(_VARIABLE, "0") not in ("", "0")


@contextmanager
def agreed_arguments(group: comm.Group, /, **arguments: object) -> Iterator[None]:
    """Around a call's local checks: leave only if they pass, in debug mode only if on all ranks.

    Args:
        group: the ranks that make this call together.
        arguments: by name, the same names on all ranks. Of tensors count shape and dtype, and of
            those with integers the values; everything else is compared as text.

    Raises:
        LayoutError: in debug mode, on every rank, if the arguments differ or another rank's checks
            fail. A failure of this rank's own is raised as it is.
    """
    comm.group_rank(group)
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if is_checking() and comm.group_size(group) > 1:
        own = {name: _described(value) for name, value in arguments.items()}
        if failure is not None:
            own[_ERROR] = str(failure).encode("ascii", "replace").decode()[:_LONGEST_ERROR]
        everyone = _shared(own, group=group)
        difference = _difference(everyone)
        if difference is not None:
            disagreement = LayoutError(difference)
            disagreement.on_all_ranks = True
            raise disagreement from failure
        if isinstance(failure, LayoutError):
            failure.on_all_ranks = True
    if failure is not None:
        raise failure


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return _shortened(str(value))
    kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value.is_floating_point() or value.is_meta:
        return kind
    return f"{kind} {_shortened(str(value.tolist()))}"


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_VALUE:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{text[: _LONGEST_VALUE - 40]}... ({len(text):,} characters, sha256 {digest})"


def _shared(own: Mapping[str, str], *, group: comm.Group) -> list[dict[str, str]]:
    """What every rank says, in rank order."""
    device, rank = comm.message_device(group), comm.group_rank(group)
    message = json.dumps(own).encode().ljust(_MESSAGE_BYTES)
    assert len(message) == _MESSAGE_BYTES, f"{len(message)} bytes of arguments: {own}"
    # As fp32, which every backend and group carries; nobody computes with it.
    sent = torch.frombuffer(bytearray(message), dtype=torch.float32).to(device)
    peers = [peer for peer in range(comm.group_size(group)) if peer != rank]
    sends = [comm.Transfer(sent, peer, _TAG) for peer in peers]
    recvs = [comm.Transfer(torch.empty_like(sent), peer, _TAG) for peer in peers]
    with comm.record_into(None):
        received = comm.exchange(sends, recvs, group=group).wait()
    messages = dict(zip(peers, received, strict=True)) | {rank: sent}
    return [json.loads(messages[i].cpu().numpy().tobytes()) for i in sorted(messages)]


def _difference(everyone: list[dict[str, str]]) -> str | None:
    """What the ranks do not agree on, in the same words on all of them; None if nothing."""
    failed = {rank: said[_ERROR] for rank, said in enumerate(everyone) if _ERROR in said}
    if len(failed) == len(everyone) and len(set(failed.values())) == 1:
        # Each rank has it at hand, with its traceback.
        return None
    names = dict.fromkeys(name for said in everyone for name in said if name != _ERROR)
    lines = [f"rank {rank}: {error}" for rank, error in failed.items()]
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, said in enumerate(everyone):
            ranks.setdefault(said.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            lines.append(f"{name}: " + "; ".join(f"{_ranks(r)} {v}" for v, r in ranks.items()))
    if not lines:
        return None
    return "the ranks do not make the same call:\n" + "\n".join(lines)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    return f"ranks {', '.join(map(str, ranks))} have"
