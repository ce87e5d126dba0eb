"""What a run will do, worked out before any device or rank is touched.

Pure: the same on every rank from config, files and world size. Everything that a user can get
wrong between config, dataset and world is found here.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringctx.config import Config
from ringctx.config_file import config_to_dict
from ringctx.data import Plan, open_dataset
from ringctx.data.documents import Dataset
from ringctx.errors import CheckpointError, ConfigError
from ringctx.parallel.mesh import StepLayout, step_layouts

__all__ = ["RunPlan", "changed_fields", "layout_table", "make_run_plan"]

# A resumed run with another value of these would not be the same model on the same data. What may
# change in the curriculum, the plan decides: it knows what its state can follow.
_FIXED = ("model.", "train.seed")
_WARNED = ("optim.", "train.dtype", "train.steps", "curriculum.tokens_per_step")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Config with nothing left open, dataset, and the steps to take."""

    config: Config
    dataset: Dataset
    plan: Plan
    layouts: dict[int, StepLayout]
    """For every sequence length of the plan."""
    num_steps: int
    """Where the run ends; steps count from 0."""


def make_run_plan(
    config: Config, *, world_size: int, state: Mapping[str, Any] | None = None
) -> RunPlan:
    """Open the dataset, plan the steps and fit them to the world.

    Args:
        config: as read from the YAML.
        world_size: ranks of the run.
        state: of the plan, from a checkpoint; None to start.

    Raises:
        ConfigError: if dataset, plan and world do not fit.
        DatasetError: if the dataset is damaged.
    """
    if config.tracking.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"tracking.wandb={config.tracking.wandb} needs wandb: pip install 'ringctx[wandb]', or "
            "set it to null"
        )
    dataset = open_dataset(config.data.path)
    model = config.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=dataset.vocab_size)
    elif model.vocab_size < dataset.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size:,} is smaller than the {dataset.vocab_size:,} ids "
            f"of {config.data.path}; set model.vocab_size to null or at least to that"
        )
    plan = Plan(dataset, config.curriculum, seed=config.train.seed, state=state)
    layouts = step_layouts(plan.bucket_lens, world_size=world_size, parallel=config.parallel)
    num_steps = len(plan) if config.train.steps is None else config.train.steps
    if num_steps > len(plan):
        raise ConfigError(
            f"train.steps={num_steps:,} is more than the {len(plan):,} steps of the plan; lower "
            "it, or set curriculum.total_tokens to repeat the data"
        )
    config = dataclasses.replace(
        config, model=model, train=dataclasses.replace(config.train, steps=num_steps)
    )
    return RunPlan(config=config, dataset=dataset, plan=plan, layouts=layouts, num_steps=num_steps)


def changed_fields(before: Mapping[str, Any], config: Config) -> list[str]:
    """The settings that differ from a checkpoint's and may change the trajectory.

    Args:
        before: the config that a checkpoint holds.
        config: of this run.

    Returns:
        `section.key: old -> new`, for a warning.

    Raises:
        CheckpointError: if a setting differs that a resume cannot change.
    """
    now = config_to_dict(config)
    lines = {
        f"{section}.{key}": f"{section}.{key}: {before.get(section, {}).get(key)} -> {value}"
        for section, values in now.items()
        for key, value in values.items()
        if _plain(before.get(section, {}).get(key)) != _plain(value)
    }
    refused = [line for name, line in lines.items() if name.startswith(_FIXED)]
    if refused:
        raise CheckpointError(
            "the checkpoint was made with other settings that cannot change on resume:\n"
            + "\n".join(refused)
            + "\nrestore them, or choose another train.run_dir to start anew"
        )
    return [line for name, line in lines.items() if name.startswith(_WARNED)]


def layout_table(run: RunPlan) -> list[str]:
    """One line a sequence length: how its rows are spread, and what the plan leaves out."""
    rows = []
    for length in sorted(run.layouts):
        layout = run.layouts[length]
        per_step = run.config.curriculum.tokens_per_step // length
        empty = layout.rows_without_targets(per_step)
        rows.append(
            f"len {length:>9,}: {per_step:>6,} sequences a step, cp {layout.cp_degree} x dp "
            f"{layout.dp_degree}, {layout.num_rounds(per_step)} forwards of {layout.rows} rows"
            + (f", {empty} rows a step without targets" if empty else "")
        )
    return rows


def _plain(value: Any) -> Any:
    """Tuples come back from JSON as lists."""
    return list(value) if isinstance(value, tuple) else value
