"""What a run will do, worked out before any weight is made.

Pure: the same on every rank from config, files, world size and a checkpoint's counters. Everything
that a user can get wrong between config, dataset and world is found here.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ringctx.config import Config
from ringctx.config_file import config_to_dict
from ringctx.data import Dataset, Plan, open_dataset
from ringctx.errors import CheckpointError, ConfigError
from ringctx.parallel.mesh import StepLayout, step_layouts

__all__ = ["RunPlan", "changed_fields", "fields_to_agree_on", "layout_table", "make_run_plan"]

# A resumed run with another value of these would not be the same model on the same data. What may
# change in the curriculum, the plan decides: it knows what its state can follow.
_FIXED = ("model.", "train.seed")
_WARNED = ("optim.", "train.dtype", "train.steps", "curriculum.tokens_per_step")
# Where things lie may differ between nodes.
_PLACES = ("data.path", "train.run_dir")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Config, dataset, and the steps to take."""

    config: Config
    """As the user gave it, with the vocabulary filled in."""
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
    _check_wandb(config)
    dataset = open_dataset(config.data.path)
    config = _with_vocabulary(config, dataset)
    plan = Plan(dataset, config.curriculum, seed=config.train.seed, state=state)
    layouts = step_layouts(plan.bucket_lens, world_size=world_size, parallel=config.parallel)
    num_steps = config.train.steps or len(plan)
    if num_steps > len(plan):
        raise ConfigError(
            f"train.steps={num_steps:,} is more than the {len(plan):,} steps of the plan; lower "
            "it, or set curriculum.total_tokens to repeat the data"
        )
    return RunPlan(config=config, dataset=dataset, plan=plan, layouts=layouts, num_steps=num_steps)


def changed_fields(before: Mapping[str, Any], config: Config) -> list[str]:
    """The settings that differ from a checkpoint's and may change the trajectory.

    Args:
        before: the config that a checkpoint holds.
        config: of this run, as read from the YAML.

    Returns:
        `section.key: old -> new`, for a warning.

    Raises:
        CheckpointError: if a setting differs that a resume cannot change.
    """
    # A setting that is newer than the checkpoint was at its default then.
    defaults = _flat(config_to_dict(Config(data=config.data)))
    then, now = {**defaults, **_flat(before)}, _flat(config_to_dict(config))
    if now["model.vocab_size"] is None:
        # Follows from the dataset, which the plan's state checks.
        del now["model.vocab_size"]
    lines = {
        name: f"{name}: {then[name]} -> {value}"
        for name, value in now.items()
        if then[name] != value
    }
    refused = [line for name, line in lines.items() if name.startswith(_FIXED)]
    if refused:
        raise CheckpointError(
            "the checkpoint was made with other settings that cannot change on resume:\n"
            + "\n".join(refused)
            + "\nrestore them, or choose another train.run_dir to start anew"
        )
    return [line for name, line in lines.items() if name.startswith(_WARNED)]


def fields_to_agree_on(run: RunPlan) -> dict[str, Any]:
    """What must be the same on every rank, by name."""
    fields = _flat(config_to_dict(run.config))
    same = {name: value for name, value in fields.items() if name not in _PLACES}
    return {"dataset": run.dataset.fingerprint, **same, "plan": run.plan.hash}


def layout_table(run: RunPlan) -> list[str]:
    """How the rows of each length are spread, what of the data is in no step, what was cut."""
    tokens_per_step, summary = run.config.curriculum.tokens_per_step, run.plan.describe()
    lines = [
        _layout_line(
            length,
            run.layouts[length],
            num_rows=tokens_per_step // length,
            ulysses_degree=run.config.parallel.ulysses_degree,
        )
        for length in sorted(run.layouts)
    ]
    dropped = summary.dropped_tokens + summary.left_over_tokens
    lines.append(
        f"plan: {len(run.plan):,} steps of {tokens_per_step:,} tokens, the run takes the first "
        f"{run.num_steps:,}; {dropped:,} tokens are in no step ({summary.dropped_tokens:,} too "
        f"short, {summary.left_over_tokens:,} left over)"
    )
    lines += [
        f"plan: cut from {fold.bucket:,} to {fold.into:,} tokens: {fold.pieces:,} ({fold.reason})"
        for fold in summary.folds
    ]
    return lines


def _layout_line(length: int, layout: StepLayout, *, num_rows: int, ulysses_degree: int) -> str:
    empty = layout.rows_without_targets(num_rows)
    shared = min(ulysses_degree, layout.cp_degree)
    split = f" (ulysses {shared} x ring {layout.cp_degree // shared})" if shared > 1 else ""
    return (
        f"len {length:>9,}: sequences a step {num_rows:>6,}, cp {layout.cp_degree}{split} x dp "
        f"{layout.dp_degree}, forwards {layout.num_rounds(num_rows)} x rows {layout.rows}"
        + (f", rows without targets {empty}" if empty else "")
    )


def _check_wandb(config: Config) -> None:
    if config.tracking.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"tracking.wandb={config.tracking.wandb} needs wandb: pip install 'ringctx[wandb]', or "
            "set it to null"
        )


def _with_vocabulary(config: Config, dataset: Dataset) -> Config:
    model = config.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=dataset.vocab_size)
    elif model.vocab_size < dataset.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size:,} is smaller than the {dataset.vocab_size:,} ids "
            f"of {config.data.path}; set model.vocab_size to null or at least to that"
        )
    return dataclasses.replace(config, model=model)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by `section.key`, however deep; tuples as the lists that JSON makes of them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
