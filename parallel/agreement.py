"""Ranks agree before they go on: what fails on one rank fails on all, with the same message.

Used where a rank may fail by itself (a disk, a file, another version of the code), never inside a
training step. Price: one all-gather of a small object.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["require_equal", "together"]

T = TypeVar("T")


def together(
    act: Callable[[], T],
    *,
    failures: tuple[type[Exception], ...],
    only_first: bool = False,
) -> list[T]:
    """Run on every rank, or on the first alone, and let all ranks fail where one does.

    Args:
        act: what to run.
        failures: the errors to share. Another error is a bug: it ends its own rank at once.
        only_first: run on rank 0 only; the others wait for it.

    Returns:
        The results of the ranks that ran it, by rank.

    Raises:
        Exception: the first failing rank's own error type, with the messages of all that failed.
    """
    runs = not only_first or dist.get_rank() == 0
    result: T | None = None
    failure: Exception | None = None
    try:
        result = act() if runs else None
    except failures as error:
        failure = error
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (runs, result, _portable(failure)))
    failed = {rank: entry[2] for rank, entry in enumerate(everyone) if entry[2]}
    if failed:
        raise _joined(failed) from failure
    return [entry[1] for entry in everyone if entry[0]]


def require_equal(value: str, *, what: str, error: type[Exception]) -> None:
    """Raise on all ranks unless all pass the same value.

    Args:
        value: short, for example a hash.
        what: names the value in the message.
        error: the type to raise.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    if len(set(everyone)) > 1:
        listing = "; ".join(f"rank {rank}: {seen}" for rank, seen in enumerate(everyone))
        raise error(f"the ranks do not agree on {what}: {listing}")


def _portable(failure: Exception | None) -> tuple[type[Exception], str] | None:
    return None if failure is None else (type(failure), str(failure))


def _joined(failed: dict[int, tuple[type[Exception], str]]) -> Exception:
    kind = next(iter(failed.values()))[0]
    messages = {message for _, message in failed.values()}
    if len(messages) == 1 and len(failed) == dist.get_world_size():
        return kind(messages.pop())
    return kind("\n".join(f"rank {rank}: {message}" for rank, (_, message) in failed.items()))
