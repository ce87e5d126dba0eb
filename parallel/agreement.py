"""Ranks agree before they go on: what fails on one rank fails on all, with the same message.

Used where a rank may fail by itself (a disk, a file, another version of the code), never inside a
training step. Price: one all-gather of a small object.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from ringctx.errors import RingctxError

__all__ = ["agree", "agree_on_first", "require_equal"]

T = TypeVar("T")


def agree(act: Callable[[], T], *, error: type[RingctxError]) -> T:
    """Run on every rank, and let all ranks fail where one does.

    Args:
        act: what to run. Of what it raises, RingctxError and OSError are shared; another error is
            a bug and ends its own rank at once.
        error: the type to raise for an OSError.

    Returns:
        This rank's own result; it does not travel.

    Raises:
        RingctxError: on every rank, of the type that the first failing rank raised, with the
            messages of all that failed.
    """
    result, failure = _try(act, error)
    _share(failure, num_asked=dist.get_world_size())
    assert not isinstance(result, _Nothing)
    return result


def agree_on_first(act: Callable[[], T], *, error: type[RingctxError]) -> T:
    """Run on rank 0 alone; every rank gets its result, or its failure.

    Args:
        act: as in `agree`; its result must be picklable and small.
        error: as in `agree`.

    Returns:
        What rank 0 returned.

    Raises:
        RingctxError: on every rank, if rank 0 failed.
    """
    result, failure = _try(act, error) if dist.get_rank() == 0 else (_Nothing(), None)
    _share(failure, num_asked=1)
    answer: list[Any] = [result]
    dist.broadcast_object_list(answer, src=0)
    first: T = answer[0]
    return first


def require_equal(values: Mapping[str, Any], *, error: type[RingctxError]) -> None:
    """Raise on all ranks unless all pass the same values.

    Args:
        values: small and picklable, by name; the same names on every rank.
        error: the type to raise.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(values))
    differing = [
        f"{name}: "
        + ", ".join(f"rank {rank} has {seen[name]}" for rank, seen in enumerate(everyone))
        for name in values
        if any(seen[name] != everyone[0][name] for seen in everyone)
    ]
    if differing:
        raise _everywhere(error("the ranks do not agree:\n" + "\n".join(differing)))


class _Nothing:
    """No result."""


def _try(
    act: Callable[[], T], error: type[RingctxError]
) -> tuple[T | _Nothing, RingctxError | None]:
    try:
        return act(), None
    except RingctxError as failure:
        return _Nothing(), failure
    except OSError as failure:
        return _Nothing(), error(str(failure))


def _share(failure: RingctxError | None, *, num_asked: int) -> None:
    """Raise on all ranks if any passes a failure; ranks are named unless all asked say the same."""
    own = None if failure is None else (type(failure), str(failure))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    failed = {rank: entry for rank, entry in enumerate(everyone) if entry}
    if not failed:
        return
    kind = next(iter(failed.values()))[0]
    messages = {message for _, message in failed.values()}
    if len(messages) == 1 and len(failed) == num_asked:
        raise _everywhere(kind(messages.pop())) from failure
    lines = [f"rank {rank}: {message}" for rank, (_, message) in failed.items()]
    raise _everywhere(kind("\n".join(lines))) from failure


def _everywhere(error: RingctxError) -> RingctxError:
    error.on_all_ranks = True
    return error
