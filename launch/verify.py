"""Is this layout right here? The configured run against one process, on the same batches.

For each sequence length of the plan, the first step of that length, and the last step of the run
where it sees farther or rotates by another theta: loss and every gradient of the ranks together,
against the model in one piece on rank 0. Writes nothing.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.config import Config
from ringctx.data import Loader, RowShard, Step
from ringctx.errors import ConfigError
from ringctx.launch.entry import run_on_rank
from ringctx.model import Transformer
from ringctx.parallel.agreement import agree
from ringctx.parallel.comm import SoloGroup
from ringctx.parallel.mesh import Mesh, World, context_mesh
from ringctx.parallel.model_states import Engine, whole
from ringctx.run_plan import RunPlan, make_run_plan
from ringctx.train_step import (
    accumulate_gradients,
    build_engine,
    build_model,
    model_arguments,
    row_shard,
    starting_value,
)

__all__ = ["Comparison", "compare", "main"]

# Relative to the largest entry of each gradient. Rounding alone, over a few layers, stays ten
# times below; a wrong mask, scale or missing block is off by far more.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One step, by all ranks and by one process."""

    bucket_len: int
    cp_degree: int
    window: int | None
    """Of the step; None: the model's own."""
    loss: float
    loss_alone: float
    differences: dict[str, float]
    """By parameter: largest difference of a gradient entry, relative to its largest entry."""

    @property
    def parameter(self) -> str:
        """Whose gradient differs most."""
        # NaN compares false with everything, so it must win here.
        return max(self.differences, key=lambda name: _nan_last(self.differences[name]))

    @property
    def largest(self) -> float:
        """The largest difference of any gradient."""
        return self.differences[self.parameter]

    @property
    def loss_difference(self) -> float:
        """Relative difference of the loss."""
        return abs(self.loss - self.loss_alone) / max(abs(self.loss_alone), 1e-12)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of one rank; 0 if equal, 1 if not, 2 if the config is wrong."""
    given = sys.argv[1:] if arguments is None else arguments
    # The other ranks wait while rank 0 computes a whole step alone.
    return run_on_rank(given, _verify, timeout=timedelta(hours=6))


def _verify(config: Config, world: World) -> int:
    worst = 0.0
    tolerance = TOLERANCES[config.train.dtype]
    run = agree(lambda: make_run_plan(config, world_size=world.size), error=ConfigError)
    for result in compare(run, world=world):
        worst = max(worst, _nan_last(result.largest), _nan_last(result.loss_difference))
        if world.rank == 0:
            sys.stdout.write(_line(result) + "\n")
            sys.stdout.writelines(_wrong_gradients(result, tolerance))
    if world.rank == 0:
        verdict = "equal to one process" if worst <= tolerance else "NOT equal to one process"
        sys.stdout.write(
            f"{verdict}: largest difference {worst:.1e}, tolerance {tolerance:.0e} "
            f"({config.train.dtype}, {world.size} ranks, {config.parallel.engine})\n"
        )
    return 0 if worst <= tolerance else 1


def compare(run: RunPlan, *, world: World) -> Iterator[Comparison]:
    """Compare some steps, as the module says; every rank must go through all of them.

    Args:
        run: the plan from its beginning.
        world: all ranks.

    Yields:
        One comparison a step, the same on all ranks.
    """
    mesh = Mesh(run.plan.bucket_lens, world=world, parallel=run.config.parallel)
    engine = build_engine(run.config, world=world, start=_starting_value)
    loader = Loader(
        run.dataset, run.plan, shard_for=lambda n: row_shard(mesh.for_length(n), bucket_len=n)
    )
    for planned in _steps_to_compare(run):
        bucket_len, num_targets = planned.bucket_len, planned.num_targets
        loss_sum = accumulate_gradients(
            engine,
            loader.step(planned.step),
            mesh=mesh.for_length(bucket_len),
            world=world,
            num_targets=num_targets,
        )
        dist.all_reduce(loss_sum)
        grads = _whole_gradients(engine, keep=world.rank == 0)
        engine.model.zero_grad()
        answer: list[Comparison | None] = [None]
        if world.rank == 0:
            alone, reference = _one_process(run, planned, device=world.device)
            differences = _differences(grads, reference)
            answer[0] = Comparison(
                bucket_len=bucket_len,
                cp_degree=mesh.for_length(bucket_len).sizes.cp_degree,
                window=planned.window,
                loss=float(loss_sum) / max(1, num_targets),
                loss_alone=alone,
                differences=differences,
            )
        dist.broadcast_object_list(answer, src=0)
        assert answer[0] is not None
        yield answer[0]


def _steps_to_compare(run: RunPlan) -> list[Step]:
    """The first step of each sequence length, and the last of all if it is of another kind."""
    first: dict[int, int] = {}
    num_lengths = len(run.plan.bucket_lens)
    for step in range(run.num_steps):
        first.setdefault(run.plan.bucket_len(step), step)
        if len(first) == num_lengths:
            break
    steps = [run.plan.step(first[length]) for length in sorted(first)]
    last = run.plan.step(run.num_steps - 1)
    known = {(step.bucket_len, step.window, step.rope_theta) for step in steps}
    if (last.bucket_len, last.window, last.rope_theta) not in known:
        steps.append(last)
    return steps


def _whole_gradients(engine: Engine, *, keep: bool) -> dict[str, Tensor]:
    """Every rank takes part, one parameter at a time; those that do not keep get none."""
    gradients = {}
    for name, parameter in engine.model.named_parameters():
        assert parameter.grad is not None, name
        gradient = whole(parameter.grad).float()
        if keep:
            # DDP puts the model one level down.
            gradients[name.removeprefix("module.")] = gradient
    return gradients


def _one_process(
    run: RunPlan, planned: Step, *, device: torch.device
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step by the model in one piece, a row at a time."""
    model = _whole_model(run.config).to(device)
    mesh = context_mesh(SoloGroup(), layout="contiguous")
    shard = RowShard(
        dp_rank=0, dp_degree=1, rows=1, positions=np.arange(planned.bucket_len, dtype=np.int64)
    )
    loader = Loader(run.dataset, run.plan, shard_for=lambda _: shard)
    total, num_targets = 0.0, max(1, planned.num_targets)
    for batch in loader.step(planned.step):
        loss_sum = model(**model_arguments(batch, mesh=mesh, device=device))
        (loss_sum / num_targets).backward()
        total += float(loss_sum.detach())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return total / num_targets, grads


def _whole_model(config: Config) -> Transformer:
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_starting_value(name, parameter.shape, config=config))
    return model


def _starting_value(name: str, shape: torch.Size, *, config: Config) -> Tensor:
    """As a run starts, but no gain is 1: a gain that is lost or rounded must show."""
    value = starting_value(name, shape, config=config)
    if len(shape) > 1:
        return value
    noise = starting_value(name, torch.Size((*shape, 1)), config=config).squeeze(-1)
    return value + 0.1 * noise


def _differences(grads: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    assert grads.keys() == reference.keys()
    return {name: _difference(grads[name], expected) for name, expected in reference.items()}


def _difference(grad: Tensor, expected: Tensor) -> float:
    largest = float((grad - expected).abs().max())
    # Of a step without targets both are 0, and equal.
    return largest and largest / max(float(expected.abs().max()), 1e-30)


def _nan_last(value: float) -> float:
    """A difference that is not a number is the worst of all."""
    return value if value == value else float("inf")


def _wrong_gradients(result: Comparison, tolerance: float) -> Iterator[str]:
    """One line for each gradient beyond the tolerance."""
    for name, difference in result.differences.items():
        if not difference <= tolerance:
            yield f"    {name}: {difference:.1e}\n"


def _line(result: Comparison) -> str:
    window = "" if result.window is None else f"  window {result.window:,}"
    return (
        f"len {result.bucket_len:>9,}  cp {result.cp_degree:>2}{window}  loss {result.loss:.6f} "
        f"(differs by {result.loss_difference:.1e})  gradients differ by at most "
        f"{result.largest:.1e} ({result.parameter})"
    )


if __name__ == "__main__":
    sys.exit(main())
