"""Train: `torchrun --nproc-per-node 8 -m ringctx.launch.train config.yaml key=value ...`.

Without torchrun it trains in this one process. A user's mistake ends every rank with exit code 2
and one message, before any work is lost.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ringctx.config import Config
from ringctx.errors import ConfigError
from ringctx.launch.distributed import log_to_file
from ringctx.launch.entry import run_on_rank
from ringctx.parallel.agreement import agree
from ringctx.parallel.mesh import World
from ringctx.resume import plan_or_resume
from ringctx.trainer import start

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of one rank; returns its exit code."""
    return run_on_rank(sys.argv[1:] if arguments is None else arguments, _train)


def _train(config: Config, world: World) -> int:
    beginning = plan_or_resume(config, world=world)
    # Nothing is written before the run is known to fit.
    agree(lambda: log_to_file(Path(config.train.run_dir)), error=ConfigError)
    start(beginning, world=world).fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
