"""Train: `torchrun --nproc-per-node 8 -m ringctx.launch.train config.yaml key=value ...`.

Without torchrun it trains in this one process. A user's mistake ends every rank with exit code 2
and one message, before any work is lost.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ringctx.config_file import load_config
from ringctx.errors import ConfigError, RingctxError
from ringctx.launch.distributed import global_rank, log_to_console, log_to_file, world_group
from ringctx.parallel.agreement import together
from ringctx.run_plan import make_run_plan
from ringctx.trainer import start

__all__ = ["exit_code", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of one rank; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: _train(given))


def exit_code(run: Callable[[], int]) -> int:
    """Run, and turn a user's mistake into one message on rank 0 and exit code 2 on all ranks."""
    try:
        return run()
    except (RingctxError, OSError) as error:
        if global_rank() == 0:
            sys.stderr.write(f"ringctx: error: {error}\n")
        return 2


def _train(arguments: Sequence[str]) -> int:
    if not arguments:
        raise ConfigError("no config given: ringctx.launch.train CONFIG.yaml [key=value ...]")
    config = load_config(arguments[0], arguments[1:])
    log_to_console()
    with world_group(config.train.device) as world:
        failures = (RingctxError, OSError)
        plans = together(lambda: make_run_plan(config, world_size=world.size), failures=failures)
        # Nothing is written before the run is known to fit.
        together(lambda: log_to_file(Path(config.train.run_dir)), failures=failures)
        start(plans[world.rank], world=world).fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
