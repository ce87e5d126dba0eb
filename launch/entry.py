"""What every entry point on ranks shares: a config, a world, and one clear end for a mistake."""

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta

from ringctx.config import Config
from ringctx.config_file import load_config
from ringctx.errors import ConfigError, RingctxError
from ringctx.launch.distributed import global_rank, log_to_console, world_group, world_size
from ringctx.parallel.agreement import agree
from ringctx.parallel.mesh import World

__all__ = ["exit_code", "run_on_rank"]


def run_on_rank(
    arguments: Sequence[str],
    body: Callable[[Config, World], int],
    *,
    timeout: timedelta = timedelta(minutes=10),
) -> int:
    """Read `CONFIG.yaml [key=value ...]`, join the other ranks, and run.

    Args:
        arguments: of the command line.
        body: the same on every rank; returns the exit code.
        timeout: of a collective; longer than any rank may keep the others waiting.

    Returns:
        The exit code of this rank: 2 for a user's mistake.
    """

    def run() -> int:
        log_to_console()
        with world_group(_device(arguments), timeout=timeout) as world:
            return body(agree(lambda: _config(arguments), error=ConfigError), world)

    return exit_code(run)


def exit_code(run: Callable[[], int]) -> int:
    """Run, and turn a user's mistake into a message and exit code 2.

    A mistake that all ranks found is told by rank 0; one that only this rank found, by this rank.
    """
    try:
        return run()
    except (RingctxError, OSError) as error:
        told_by_all = getattr(error, "on_all_ranks", False) or world_size() == 1
        if not told_by_all:
            sys.stderr.write(f"ringctx: error: rank {global_rank()}: {error}\n")
        elif global_rank() == 0:
            sys.stderr.write(f"ringctx: error: {error}\n")
        return 2


def _config(arguments: Sequence[str]) -> Config:
    if not arguments:
        raise ConfigError("no config given; write CONFIG.yaml [section.key=value ...]")
    return load_config(arguments[0], arguments[1:])


def _device(arguments: Sequence[str]) -> str:
    try:
        return _config(arguments).train.device
    except ConfigError:
        # Told when the ranks are together, so that all of them end with it.
        return "auto"
