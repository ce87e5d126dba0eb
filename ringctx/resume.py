"""Where a run begins: at step 0, or where one of its checkpoints left off.

All ranks come to the same answer, or all end with the same message; nothing is written.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ringctx.checkpoint import Found, find_checkpoint
from ringctx.config import Config
from ringctx.errors import CheckpointError, ConfigError
from ringctx.parallel.agreement import agree, agree_on_first, require_equal
from ringctx.parallel.mesh import World
from ringctx.run_plan import RunPlan, changed_fields, fields_to_agree_on, make_run_plan

__all__ = ["Beginning", "checkpoint_folder", "plan_or_resume"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beginning:
    """Where a run begins: its plan, and the checkpoint if it goes on from one."""

    run: RunPlan
    found: Found | None


def plan_or_resume(config: Config, *, world: World) -> Beginning:
    """Plan the run, from the checkpoint that `checkpoint.resume` names if there is one.

    Args:
        config: as read from the YAML.
        world: all ranks, with the process group up; every rank must call it.

    Raises:
        ConfigError, DatasetError, CheckpointError: on every rank, whichever found the fault.
    """
    run_dir, resume = Path(config.train.run_dir), config.checkpoint.resume
    if resume == "never":
        agree_on_first(partial(_refuse_used, run_dir), error=CheckpointError)
        found = None
    else:
        found = find_checkpoint(checkpoint_folder(config), resume=resume)

    def plan() -> RunPlan:
        if found is None:
            return make_run_plan(config, world_size=world.size)
        for line in changed_fields(found.trainer_state["config"], config):
            _LOG.warning("changed since the checkpoint: %s", line)
        return make_run_plan(config, world_size=world.size, state=found.trainer_state["plan"])

    run = agree(plan, error=ConfigError)
    require_equal(fields_to_agree_on(run), error=ConfigError)
    return Beginning(run, found)


def checkpoint_folder(config: Config) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(config.train.run_dir) / "checkpoints"


def _refuse_used(run_dir: Path) -> None:
    if (run_dir / "checkpoints").exists() or (run_dir / "metrics.jsonl").exists():
        raise CheckpointError(
            f"checkpoint.resume=never, but train.run_dir={run_dir} holds a run; choose another "
            "folder, or checkpoint.resume=auto to go on from its newest checkpoint"
        )
