"""Is this layout right here? The configured run against one process, on the same batches.

For each sequence length of the plan, the first step of that length: loss and every gradient of the
ranks together, against the model in one piece on rank 0. Writes nothing.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.config import Config
from ringctx.config_file import load_config
from ringctx.data import Loader, RowShard
from ringctx.errors import ConfigError, RingctxError
from ringctx.launch.distributed import log_to_console, world_group
from ringctx.launch.train import exit_code
from ringctx.model import Transformer, initialise
from ringctx.parallel.agreement import together
from ringctx.parallel.comm import SoloGroup
from ringctx.parallel.mesh import ContextMesh, Mesh, StepLayout, World
from ringctx.parallel.model_states import Engine, whole
from ringctx.run_plan import RunPlan, make_run_plan
from ringctx.trainer import DTYPES, accumulate_gradients, build_engine, row_shard

__all__ = ["Comparison", "compare", "main"]

# Relative to the largest entry of each gradient. Rounding alone, over a few layers, stays ten
# times below; a wrong mask, scale or missing block is off by far more.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One step, by all ranks and by one process."""

    bucket_len: int
    cp_degree: int
    loss: float
    loss_alone: float
    largest: float
    """Largest difference of a gradient entry, relative to that gradient's largest entry."""
    parameter: str
    """Where the largest difference is."""

    @property
    def loss_difference(self) -> float:
        """Relative difference of the loss."""
        return abs(self.loss - self.loss_alone) / max(abs(self.loss_alone), 1e-12)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of one rank; 0 if equal, 1 if not, 2 if the config is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: _verify(given))


def _verify(arguments: Sequence[str]) -> int:
    if not arguments:
        raise ConfigError("no config given: ringctx.launch.verify CONFIG.yaml [key=value ...]")
    config = load_config(arguments[0], arguments[1:])
    log_to_console()
    worst = 0.0
    tolerance = TOLERANCES[config.train.dtype]
    with world_group(config.train.device) as world:
        plans = together(
            lambda: make_run_plan(config, world_size=world.size), failures=(RingctxError, OSError)
        )
        for result in compare(plans[world.rank], world=world):
            # A gradient that is not a number must not pass.
            parts = (result.largest, result.loss_difference)
            worst = max(worst, *(part if part == part else float("inf") for part in parts))
            if world.rank == 0:
                sys.stdout.write(_line(result) + "\n")
        if world.rank == 0:
            verdict = "equal to one process" if worst <= tolerance else "NOT equal to one process"
            sys.stdout.write(
                f"{verdict}: largest difference {worst:.1e}, tolerance {tolerance:.0e} "
                f"({config.train.dtype}, {world.size} ranks, {config.parallel.engine})\n"
            )
    return 0 if worst <= tolerance else 1


def compare(run: RunPlan, *, world: World) -> Iterator[Comparison]:
    """Compare the first step of each sequence length; every rank must go through all of it.

    Args:
        run: the plan from its beginning.
        world: all ranks.

    Yields:
        One comparison a length, the same on all ranks.
    """
    mesh = Mesh(run.plan.bucket_lens, world=world, parallel=run.config.parallel)
    engine = build_engine(run.config, world=world)
    loader = Loader(
        run.dataset, run.plan, shard_for=lambda n: row_shard(mesh.for_length(n), bucket_len=n)
    )
    for step in _first_steps(run):
        bucket_len = run.plan.step(step).bucket_len
        num_targets = run.plan.step(step).num_targets
        loss_sum = accumulate_gradients(
            engine,
            list(loader.step(step)),
            mesh=mesh.for_length(bucket_len),
            world=world,
            num_targets=num_targets,
        )
        dist.all_reduce(loss_sum)
        grads = _whole_gradients(engine)
        engine.model.zero_grad()
        answer: list[Comparison | None] = [None]
        if world.rank == 0:
            alone, reference = _one_process(run, step=step, device=world.device)
            name, largest = _largest_difference(grads, reference)
            answer[0] = Comparison(
                bucket_len=bucket_len,
                cp_degree=mesh.for_length(bucket_len).steps.cp_degree,
                loss=float(loss_sum) / num_targets,
                loss_alone=alone,
                largest=largest,
                parameter=name,
            )
        dist.broadcast_object_list(answer, src=0)
        assert answer[0] is not None
        yield answer[0]


def _first_steps(run: RunPlan) -> list[int]:
    """The first step of each sequence length of the run."""
    first: dict[int, int] = {}
    for step in range(run.num_steps):
        first.setdefault(run.plan.step(step).bucket_len, step)
        if len(first) == len(run.plan.bucket_lens):
            break
    return [first[length] for length in sorted(first)]


def _whole_gradients(engine: Engine) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in engine.model.named_parameters():
        assert parameter.grad is not None, name
        # DDP puts the model one level down.
        gradients[name.removeprefix("module.")] = whole(parameter.grad).float()
    return gradients


def _one_process(
    run: RunPlan, *, step: int, device: torch.device
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step by the model in one piece, a row at a time."""
    config, planned = run.config, run.plan.step(step)
    model = _whole_model(config).to(device)
    solo = StepLayout(cp_degree=1, dp_degree=1, rows=1)
    mesh = ContextMesh(
        group=SoloGroup(), cp_rank=0, dp_rank=0, steps=solo, layout="contiguous", schedule="auto"
    )
    shard = RowShard(
        dp_rank=0, dp_degree=1, rows=1, positions=np.arange(planned.bucket_len, dtype=np.int64)
    )
    loader = Loader(run.dataset, run.plan, shard_for=lambda _: shard)
    total = 0.0
    for batch in loader.step(step):
        loss_sum = model(
            batch.tokens.to(device),
            targets=batch.targets.to(device),
            positions=batch.positions.to(device),
            mesh=mesh,
        )
        (loss_sum / planned.num_targets).backward()
        total += float(loss_sum.detach())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return total / planned.num_targets, grads


def _whole_model(config: Config) -> Transformer:
    model = Transformer(
        config.model, dtype=DTYPES[config.train.dtype], loss_chunk=config.train.loss_chunk
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initialise(name, parameter.shape, config=config.model, seed=config.train.seed)
            parameter.copy_(value)
    return model


def _largest_difference(
    grads: dict[str, Tensor], reference: dict[str, Tensor]
) -> tuple[str, float]:
    assert grads.keys() == reference.keys()
    differences = {
        name: float((grads[name] - reference[name]).abs().max() / reference[name].abs().max())
        for name in reference
    }
    # NaN compares false with everything, so it must win here.
    return max(differences.items(), key=lambda item: (item[1] != item[1], item[1]))


def _line(result: Comparison) -> str:
    return (
        f"len {result.bucket_len:>9,}  cp {result.cp_degree:>2}  loss {result.loss:.6f} "
        f"(one process {result.loss_alone:.6f})  largest gradient difference "
        f"{result.largest:.1e} in {result.parameter}"
    )


if __name__ == "__main__":
    sys.exit(main())
