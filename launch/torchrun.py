"""Starts the ranks of one node: torchrun with the settings it needs, and one clear exit code."""

import os
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from ringctx.errors import ConfigError

__all__ = ["local_ranks", "torchrun"]


def local_ranks(nproc: str, *, option: str = "--nproc") -> int:
    """Ranks to start on this node.

    Args:
        nproc: a number, or `auto`: one a GPU, without a GPU one a core.
        option: where the number was given, for messages.

    Raises:
        ConfigError: if it is neither.
    """
    if nproc == "auto":
        return torch.cuda.device_count() or len(os.sched_getaffinity(0))
    if not nproc.isdecimal() or int(nproc) == 0:
        raise ConfigError(f"{option}={nproc} must be 'auto' or a number of ranks, at least 1")
    return int(nproc)


def torchrun(module: str, arguments: Sequence[str], *, nproc: int) -> int:
    """Run `python -m MODULE ARGUMENTS` on ranks of this node, as torchrun does.

    Args:
        module: entry point of each rank.
        arguments: of the module.
        nproc: ranks.

    Returns:
        0, or the exit code of the first rank that failed.
    """
    # A worker that is started again must not read addresses that its predecessor left behind.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    command = ["--standalone", "--nproc-per-node", str(nproc), "-m", module, *arguments]
    try:
        run(parse_args(command))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return int(first.exitcode)
    return 0
