"""What a run will do, worked out before any weight is made.

Pure: the same on every rank from config, files, world size and a checkpoint's counters. Everything
that a user can get wrong between config, dataset and world is found here.
"""

import dataclasses
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ringctx.config import Config, ParallelConfig, TopologyConfig
from ringctx.config_file import config_to_dict
from ringctx.data import Dataset, JoinedDataset, Plan, PlanSummary, open_dataset, open_datasets
from ringctx.errors import CheckpointError, ConfigError, LayoutError
from ringctx.parallel.cost import choose
from ringctx.parallel.head_exchange import key_heads
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.mesh import StepLayout, split_ranks, step_layouts
from ringctx.parallel.topology import wire_up
from ringctx.parallel.traffic import Shape

__all__ = ["RunPlan", "changed_fields", "fields_to_agree_on", "layout_table", "make_run_plan"]

# A resumed run with another value of these would not be the same model on the same data. What may
# change in the curriculum, the plan decides: it knows what its state can follow.
_FIXED = ("model.", "train.seed")
_WARNED = ("optim.", "train.dtype", "train.steps", "curriculum.tokens_per_step")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Where things lie may differ between nodes.
_PLACES = ("data.path", "data.sources", "train.run_dir")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Config, dataset, and the steps to take."""

    config: Config
    """As the user gave it, with the vocabulary filled in."""
    dataset: Dataset | JoinedDataset
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
    dataset = _open(config)
    if state is not None and dataset.changed:
        raise ConfigError(
            "data.allow_changed=true does not go with a resume: files of the dataset are not those "
            "that the run began with; restore them, or start a new run"
        )
    config = _with_vocabulary(config, dataset)
    plan = Plan(dataset, config.curriculum, seed=config.train.seed, state=state)
    layouts = step_layouts(plan.bucket_lens, world_size=world_size, parallel=config.parallel)
    _check_nodes({layout.cp_degree for layout in layouts.values()}, world_size, config.parallel)
    num_steps = config.train.steps or len(plan)
    if num_steps < plan.first_step:
        raise ConfigError(
            f"train.steps={num_steps:,}, but the checkpoint has {plan.first_step:,} steps done; "
            "raise it, or start a new run"
        )
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
        # A mapping that was null then had none of its keys.
        name: f"{name}: {then.get(name)} -> {value}"
        for name, value in now.items()
        if then.get(name) != value
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
    same = {name: value for name, value in fields.items() if not name.startswith(_PLACES)}
    return {"dataset": run.dataset.fingerprint, **same, "plan": run.plan.hash}


def layout_table(run: RunPlan) -> list[str]:
    """How the rows of each length are spread, what of the data is in no step, what was cut."""
    summary = run.plan.describe()
    lines = [
        _layout_line(
            length,
            run.layouts[length],
            num_rows=bucket.rows_per_step,
            ulysses_degree=run.config.parallel.ulysses_degree,
        )
        for length, bucket in summary.buckets.items()
    ]
    lines += [line for length in sorted(run.layouts) for line in _auto_line(run, length)]
    lines.append(
        f"plan: steps {run.plan.first_step:,} to {len(run.plan):,}; the run ends after step "
        f"{run.num_steps:,}"
    )
    lines.append(_coverage(summary))
    lines += [
        f"plan: cut from {fold.bucket:,} to {fold.into:,} tokens: {fold.pieces:,} ({fold.reason})"
        for fold in summary.folds
    ]
    return [*lines, *(f"plan: {note}" for note in summary.notes)]


def _coverage(summary: PlanSummary) -> str:
    """Where the tokens of the dataset go, with the share of each."""
    parts = [
        f"{name} {tokens:,} ({tokens / summary.dataset_tokens:.2%})"
        for name, tokens in (
            ("in steps", summary.tokens),
            ("trained before", summary.trained_tokens),
            ("dropped as too short", summary.dropped_tokens),
            ("passed over", summary.passed_over_tokens),
            ("left over at the end", summary.left_over_tokens),
            ("of these padding", -summary.padding_tokens),
            ("of these repeated", -summary.repeated_tokens),
        )
        if tokens or name in ("in steps", "dropped as too short")
    ]
    return f"plan: of {summary.dataset_tokens:,} tokens: {', '.join(parts)}"


def _layout_line(length: int, layout: StepLayout, *, num_rows: int, ulysses_degree: int) -> str:
    empty = layout.rows_without_targets(num_rows)
    shared = min(ulysses_degree, layout.cp_degree)
    split = f" (ulysses {shared} x ring {layout.cp_degree // shared})" if shared > 1 else ""
    return (
        f"len {length:>9,}: sequences a step {num_rows:>6,}, cp {layout.cp_degree}{split} x dp "
        f"{layout.dp_degree}, forwards {layout.num_rounds(num_rows)} x rows {layout.rows}"
        + (f", rows without targets {empty}" if empty else "")
    )


def _auto_line(run: RunPlan, length: int) -> list[str]:
    """What `auto` takes in the ring of rank 0; nothing where there is no ring, or no choice."""
    model, parallel, layout = run.config.model, run.config.parallel, run.layouts[length]
    if parallel.schedule != "auto":
        return []
    world_size = layout.cp_degree * layout.dp_degree
    ring = next(ring for ring in _rings(layout.cp_degree, world_size, parallel) if 0 in ring)
    if len(ring) == 1:
        return []
    shared = layout.cp_degree // len(ring)
    shape = Shape(
        batch=layout.rows,
        heads=model.num_heads // shared,
        kv_heads=sum(key_heads(model.num_heads, model.kv_heads, world_size=shared)[0].repeats),
        head_dim=model.head_width,
        dtype=_DTYPES[run.config.train.dtype],
    )
    taken = {}
    for letter in dict.fromkeys(model.mixer(layer) for layer in range(model.num_layers)):
        windowed = letter == "W"
        choice = choose(
            shape=shape,
            sharding=Sharding(length, len(ring), parallel.layout),
            mask=Mask.checked(
                causal=True,
                window=model.window if windowed else None,
                sinks=model.sinks if windowed else 0,
                cu_seqlens=None,
                seq_len=length,
            ),
            wiring=wire_up(parallel.topology, ranks=ring, world_size=world_size),
        )
        taken[letter] = f"forward {choice.forward}, backward {choice.backward}"
    told = [f"{letter} {passes}" for letter, passes in taken.items()]
    if len(set(taken.values())) == 1:
        told = list(taken.values())[:1]
    return [f"len {length:>9,}: auto: {'; '.join(told)}"]


def _rings(cp_degree: int, world_size: int, parallel: ParallelConfig) -> list[tuple[int, ...]]:
    """The global ranks of every ring of one degree."""
    degree = min(parallel.ulysses_degree, cp_degree)
    within = {
        split_ranks(rank, cp_degree=cp_degree, ulysses_degree=degree, layout=parallel.layout).ring
        for rank in range(cp_degree)
    }
    firsts = range(0, world_size, cp_degree)
    return [tuple(first + rank for rank in ring) for first in firsts for ring in sorted(within)]


def _check_nodes(cp_degrees: Collection[int], world_size: int, parallel: ParallelConfig) -> None:
    """Raise ConfigError, on every rank alike, unless the nodes fit every ring of the run."""
    rings = [ring for cp in sorted(cp_degrees) for ring in _rings(cp, world_size, parallel)]
    bad = next((ring for ring in rings if not _fits(parallel.topology, ring, world_size)), None)
    if bad is None:
        return
    fits = [
        str(nodes)
        for nodes in range(1, world_size + 1)
        if world_size % nodes == 0
        and all(
            _fits(dataclasses.replace(parallel.topology, ranks_per_node=nodes), ring, world_size)
            for ring in rings
        )
    ]
    ranks = ", ".join(map(str, bad[:4])) + (", ..." if len(bad) > 4 else "")
    raise ConfigError(
        f"parallel.topology.ranks_per_node={parallel.topology.ranks_per_node} does not spread the "
        f"{len(bad)} ranks of a ring ({ranks}) evenly over nodes, and a ring waits for its "
        f"slowest link; of the numbers that divide the world of {world_size} ranks, "
        f"{', '.join(fits)} fit"
    )


def _fits(topology: TopologyConfig, ring: tuple[int, ...], world_size: int) -> bool:
    try:
        wire_up(topology, ranks=ring, world_size=world_size)
    except LayoutError:
        return False
    return True


def _check_wandb(config: Config) -> None:
    if config.tracking.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"tracking.wandb={config.tracking.wandb} needs wandb: pip install 'ringctx[wandb]', or "
            "set it to null"
        )


def _open(config: Config) -> Dataset | JoinedDataset:
    data = config.data
    if data.sources is not None:
        return open_datasets(data.sources, allow_changed=data.allow_changed)
    return open_dataset(data.path, allow_changed=data.allow_changed)


def _with_vocabulary(config: Config, dataset: Dataset | JoinedDataset) -> Config:
    model = config.model
    if model.vocab_size is None:
        model = dataclasses.replace(model, vocab_size=dataset.vocab_size)
    elif model.vocab_size < dataset.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size:,} is smaller than the {dataset.vocab_size:,} ids "
            f"of the dataset; set model.vocab_size to null or at least to that"
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
