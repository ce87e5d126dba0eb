"""The world of a run: process group up, logs per rank, and down again without an abort.

Reads what torchrun sets in the environment; without it the world is this one process.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ringctx.errors import ConfigError, RingctxError
from ringctx.parallel.mesh import World

__all__ = ["global_rank", "log_to_console", "log_to_file", "world_group", "world_size"]


def global_rank() -> int:
    """Rank of this process, as torchrun says; 0 when it stands alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of the run, as torchrun says; 1 when this one stands alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def world_group(device: str, *, timeout: timedelta) -> Iterator[World]:
    """Start the process group of all ranks and end it.

    Args:
        device: `auto | cpu | cuda`; auto is cuda where there is one.
        timeout: of a collective.

    Raises:
        ConfigError: if cuda is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch finds no CUDA device; use auto or cpu")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_cuda else None
    if local is not None:
        if local.index >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {global_rank()} is number {local.index} on this node, which has "
                f"{torch.cuda.device_count()} GPUs; start fewer (--nproc), or set train.device=cpu"
            )
        torch.cuda.set_device(local)
        # NCCL's flight recorder: what each rank was doing when a collective hung.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if on_cuda else "gloo",
        timeout=timeout,
        device_id=local,
        # Without torchrun there is no address to meet at, and nobody to meet.
        store=None if "RANK" in os.environ else dist.HashStore(),  # type: ignore[attr-defined]
        rank=global_rank(),
        world_size=world_size(),
    )
    try:
        world = World(rank=global_rank(), size=world_size(), device=local or torch.device("cpu"))
        if on_cuda:
            # NCCL wants a collective of all ranks before the first transfer between two.
            dist.barrier()
        yield world
        _leave_together(on_cuda)
    except RingctxError as error:
        if error.on_all_ranks:
            _leave_together(on_cuda)
        raise
    finally:
        dist.destroy_process_group()


def _leave_together(on_cuda: bool) -> None:
    """Without it gloo now and then aborts a rank whose peers are already gone."""
    if on_cuda:
        dist.barrier()
    else:
        dist.monitored_barrier(timeout=timedelta(seconds=30))


def log_to_console() -> None:
    """Send log lines to standard error: everything of rank 0, errors of the others."""
    rank = global_rank()
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[{rank}] %(message)s"))
    logger = logging.getLogger("ringctx")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_to_file(run_dir: Path) -> None:
    """Also write this rank's log lines to RUN_DIR/logs/rank-<n>.log, appended on resume.

    Raises:
        ConfigError: if the folder cannot be written to.
    """
    folder = run_dir / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / f"rank-{global_rank()}.log")
    except OSError as error:
        raise ConfigError(f"train.run_dir={run_dir} cannot be written to: {error}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("ringctx").addHandler(handler)
