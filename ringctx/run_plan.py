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

from ringctx.config import Config, TopologyConfig
from ringctx.config_file import config_to_dict
from ringctx.data import Dataset, JoinedDataset, Plan, open_dataset, open_datasets
from ringctx.errors import CheckpointError, ConfigError, LayoutError
from ringctx.parallel.mesh import StepLayout, split_ranks, step_layouts
from ringctx.parallel.topology import wire_up

__all__ = ["RunPlan", "changed_fields", "fields_to_agree_on", "make_run_plan"]

# A resumed run with another value of these would not be the same model on the same data. What may
# change in the curriculum, the plan decides: it knows what its state can follow.
_FIXED = ("model.", "train.seed")
# Another kernel computes the same model.
_FREE = ("model.lightning_backend",)
_WARNED = (*_FREE, "optim.", "train.dtype", "train.steps", "curriculum.tokens_per_step")
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
    _check_installed(config)
    dataset = _open(config)
    if state is not None and dataset.changed:
        raise ConfigError(
            "data.allow_changed=true does not go with a resume: files of the dataset are not those "
            "that the run began with; restore them, or start a new run"
        )
    config = _with_vocabulary(config, dataset)
    plan = Plan(dataset, config.curriculum, seed=config.train.seed, state=state)
    layouts = step_layouts(plan.bucket_lens, world_size=world_size, parallel=config.parallel)
    _check_nodes({layout.cp_degree for layout in layouts.values()}, world_size, config)
    _check_lightning_ranks(config, layouts)
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
    refused = [
        line for name, line in lines.items() if name.startswith(_FIXED) and name not in _FREE
    ]
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


def _groups_of_ranks(cp_degree: int, world_size: int, config: Config) -> list[tuple[int, ...]]:
    """The rings of softmax layers, and the whole groups in which states of L layers travel."""
    parallel, wholes = config.parallel, [tuple(range(cp_degree))] * config.model.has("L")
    degree = min(parallel.ulysses_degree, cp_degree)
    rings = [
        split_ranks(rank, cp_degree=cp_degree, ulysses_degree=degree, layout=parallel.layout).ring
        for rank in range(cp_degree)
    ]
    within = sorted({*rings, *wholes})
    firsts = range(0, world_size, cp_degree)
    return [tuple(first + rank for rank in group) for first in firsts for group in within]


def _check_nodes(cp_degrees: Collection[int], world_size: int, config: Config) -> None:
    """Raise ConfigError, on every rank alike, unless the nodes fit every ring of the run."""
    topology = config.parallel.topology
    rings = [ring for cp in sorted(cp_degrees) for ring in _groups_of_ranks(cp, world_size, config)]
    bad = next((ring for ring in rings if not _fits(topology, ring, world_size)), None)
    if bad is None:
        return
    fits = [
        str(nodes)
        for nodes in range(1, world_size + 1)
        if world_size % nodes == 0
        and all(
            _fits(dataclasses.replace(topology, ranks_per_node=nodes), ring, world_size)
            for ring in rings
        )
    ]
    ranks = ", ".join(map(str, bad[:4])) + (", ..." if len(bad) > 4 else "")
    raise ConfigError(
        f"parallel.topology.ranks_per_node={topology.ranks_per_node} does not spread the "
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


def _check_installed(config: Config) -> None:
    """Raise ConfigError where a setting needs a package that is not there."""
    if config.tracking.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"tracking.wandb={config.tracking.wandb} needs wandb: pip install 'ringctx[wandb]', or "
            "set it to null"
        )
    _check_lightning_backend(config)


def _check_lightning_backend(config: Config) -> None:
    """Raise ConfigError where the kernels of L layers cannot run."""
    backend = config.model.lightning_backend
    if backend == "torch":
        return
    name, extra = {"triton": ("Triton", "gpu"), "fla": ("flash-linear-attention", "fla")}[backend]
    if importlib.util.find_spec(backend) is None:
        raise ConfigError(
            f"model.lightning_backend={backend} needs {name}: pip install 'ringctx[{extra}]', or "
            "choose torch"
        )
    if config.train.device == "cpu" or not torch.cuda.is_available():
        raise ConfigError(
            f"model.lightning_backend={backend} has kernels for CUDA devices only, and this run is "
            "on the CPU; choose torch"
        )
    if backend == "fla" and config.train.dtype != "bf16":
        raise ConfigError(
            f"model.lightning_backend=fla rounds its products to 16 bits, so train.dtype="
            f"{config.train.dtype} does not go with it; set train.dtype to bf16, or choose torch "
            "or triton"
        )


def _check_lightning_ranks(config: Config, layouts: Mapping[int, StepLayout]) -> None:
    """Raise ConfigError where the kernels of L layers cannot take a sequence over ranks."""
    shared = [length for length, layout in layouts.items() if layout.cp_degree > 1]
    if config.model.lightning_backend == "fla" and shared:
        raise ConfigError(
            f"model.lightning_backend=fla computes a sequence on one device, but those of "
            f"{min(shared):,} tokens are shared by {layouts[min(shared)].cp_degree} ranks; choose "
            f"torch or triton, or raise parallel.tokens_per_rank to {max(shared):,}"
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
