"""The training step, and the loop around it.

Loss of a rank: sum of its token losses * world / targets of the whole step. The engines average
gradients over the world, so the gradient is that of the mean loss over all targets of the step,
whatever the mix of data and context parallelism, accumulation, or rows without targets.
"""

import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.checkpoint import load_checkpoint, save_checkpoint, set_aside_later
from ringctx.config import Config
from ringctx.config_file import config_to_dict, config_to_yaml
from ringctx.data import Loader, Microbatch, RowShard, Step
from ringctx.errors import ConfigError, TrainingError
from ringctx.model import Transformer, flops_per_token, initialise, parameter_count
from ringctx.ops.losses import IGNORE_INDEX
from ringctx.optim import learning_rate, make_optimizer
from ringctx.parallel import positions
from ringctx.parallel.agreement import agree_on_first
from ringctx.parallel.comm import record_traffic
from ringctx.parallel.mesh import ContextMesh, Mesh, World
from ringctx.parallel.model_states import Engine, clip_gradients, make_engine
from ringctx.resume import Beginning, checkpoint_folder
from ringctx.run_plan import RunPlan, layout_table
from ringctx.tracking import StepRecord, Tracker

__all__ = [
    "Trainer",
    "accumulate_gradients",
    "build_engine",
    "build_model",
    "row_shard",
    "start",
    "starting_value",
]

_LOG = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def start(beginning: Beginning, *, world: World) -> "Trainer":
    """Make the trainer, with the weights and optimizer states of its checkpoint if there is one.

    Args:
        beginning: from `plan_or_resume`.
        world: all ranks; every rank must call it.

    Raises:
        CheckpointError: on every rank, if a rank cannot read its part.
    """
    run, found = beginning.run, beginning.found
    if found is None:
        return Trainer(run, world=world)
    state = found.trainer_state
    set_aside_later(checkpoint_folder(run.config), step=state["step"])
    trainer = Trainer(run, world=world, first_step=state["step"], tokens=state["tokens"])
    load_checkpoint(found.path, model=trainer.engine.model, optimizer=trainer.optimizer)
    _LOG.info("resumed from %s: %d steps done", found.path, state["step"])
    return trainer


class Trainer:
    """Owns model, optimizer and plan position of one rank.

    Args:
        run: what to do.
        world: all ranks, with the process group up; every rank makes its trainer.
        first_step: steps done before.
        tokens: tokens trained on before.
    """

    def __init__(self, run: RunPlan, *, world: World, first_step: int = 0, tokens: int = 0) -> None:
        config = run.config
        self.run, self.world = run, world
        self.step, self.tokens = first_step, tokens
        self.mesh = Mesh(run.plan.bucket_lens, world=world, parallel=config.parallel)
        self.loader = Loader(run.dataset, run.plan, shard_for=self._shard_for)
        self.engine = build_engine(config, world=world)
        self.parameters = list(self.engine.model.parameters())
        self.optimizer = make_optimizer(self.engine.model, config=config.optim)
        if config.parallel.engine == "ddp" and run.plan.bucket_lens:
            self._settle_buckets()

    def fit(self) -> None:
        """Train to the end of the run; writes metrics, checkpoints and config into the run folder.

        Raises:
            TrainingError: if the gradient is not finite; no weight was changed by that step.
        """
        with self._tracker() as tracker:
            steps = self.loader.steps(self.step, max(self.step, self._last_step()))
            begin = time.perf_counter()
            for planned, batches in steps:
                record = self.train_step(planned, batches, begin=begin)
                self.step, self.tokens = planned.step + 1, record.tokens
                if tracker is not None:
                    tracker.log(record)
                if self._save_due():
                    self.save()
                begin = time.perf_counter()

    def train_step(
        self, planned: Step, batches: Sequence[Microbatch], *, begin: float | None = None
    ) -> StepRecord:
        """One update of the weights.

        Args:
            planned: the step of the plan.
            batches: this rank's microbatches of it.
            begin: when the step's time began to count (`time.perf_counter`); None: now.

        Returns:
            The record of the step, the same on all ranks.
        """
        begin = time.perf_counter() if begin is None else begin
        step, optim = planned.step, self.run.config.optim
        mesh = self.mesh.for_length(planned.bucket_len)
        with record_traffic() as traffic:
            loss_sum = accumulate_gradients(
                self.engine,
                batches,
                mesh=mesh,
                world=self.world,
                num_targets=planned.num_targets,
            )
        norm = float(clip_gradients(self.parameters, max_norm=optim.clip_norm))
        if not math.isfinite(norm):
            raise _not_finite(step, norm)
        lr = learning_rate(step, num_steps=self.run.num_steps, optim=optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        sums, largest = _over_ranks(
            sums=[float(loss_sum), float(traffic.moved_bytes)],
            largest=[
                time.perf_counter() - begin,
                traffic.exposed_s(),
                float(_peak_memory_bytes(self.world.device)),
            ],
            device=self.world.device,
        )
        num_tokens = planned.pieces.shape[0] * planned.bucket_len
        return StepRecord(
            step=step,
            tokens=self.tokens + num_tokens,
            loss=sums[0] / planned.num_targets,
            lr=lr,
            grad_norm=norm,
            bucket_len=planned.bucket_len,
            num_sequences=planned.pieces.shape[0],
            cp_degree=mesh.sizes.cp_degree,
            step_time_s=largest[0],
            tokens_per_s=num_tokens / largest[0],
            comm_exposed_s=largest[1],
            moved_bytes=int(sums[1]),
            max_memory_bytes=int(largest[2]),
        )

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far; every rank must call it."""
        config = self.run.config
        return save_checkpoint(
            checkpoint_folder(config),
            step=self.step,
            model=self.engine.model,
            optimizer=self.optimizer,
            trainer_state={
                "step": self.step,
                "tokens": self.tokens,
                "plan": self.run.plan.state(self.step),
                "config": config_to_dict(config),
            },
            keep=config.checkpoint.keep,
        )

    def _last_step(self) -> int:
        """Where this process stops; the run may go on from there later."""
        return min(self.run.num_steps, self.run.config.train.stop_after or self.run.num_steps)

    def _save_due(self) -> bool:
        every = self.run.config.checkpoint.every
        return self.step == self._last_step() or (every is not None and self.step % every == 0)

    def _shard_for(self, bucket_len: int) -> RowShard:
        return row_shard(self.mesh.for_length(bucket_len), bucket_len=bucket_len)

    def _settle_buckets(self) -> None:
        """Let DDP lay out its gradient buckets before the first step.

        It does so after its first backward, and the order of a sum over ranks follows the layout:
        without this, a resumed run would round differently from one that was never stopped.
        """
        length = min(self.run.plan.bucket_lens)
        shard = self._shard_for(length)
        tokens = torch.zeros(1, len(shard.positions), dtype=torch.int64)
        nothing = Microbatch(
            tokens=tokens,
            targets=torch.full_like(tokens, IGNORE_INDEX),
            positions=torch.from_numpy(shard.positions),
        )
        mesh = self.mesh.for_length(length)
        accumulate_gradients(self.engine, [nothing], mesh=mesh, world=self.world, num_targets=1)
        self.engine.model.zero_grad()

    @contextmanager
    def _tracker(self) -> Iterator[Tracker | None]:
        """The sinks of the run on rank 0, nothing on the others."""
        opened: list[Tracker] = []
        agree_on_first(lambda: opened.append(self._open_tracker()), error=ConfigError)
        if not opened:
            yield None
            return
        with opened[0] as tracker:
            yield tracker

    def _open_tracker(self) -> Tracker:
        config = self.run.config
        run_dir = Path(config.train.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(config_to_yaml(config))
        for line in (*layout_table(self.run), _model_line(self.run)):
            _LOG.info(line)
        return Tracker(
            run_dir,
            config=config.tracking,
            resolved=config_to_dict(config),
            first_step=self.step,
            num_steps=self.run.num_steps,
        )


def build_model(config: Config) -> Transformer:
    """The model that a config describes, not yet with its starting weights."""
    return Transformer(
        config.model,
        dtype=_DTYPES[config.train.dtype],
        recompute=config.train.recompute == "layer",
        loss_chunk=config.train.loss_chunk,
    )


def starting_value(name: str, shape: torch.Size, *, config: Config) -> Tensor:
    """The value of a parameter at step 0, the same on all ranks."""
    return initialise(name, shape, config=config.model, seed=config.train.seed)


def build_engine(
    config: Config, *, world: World, start: Callable[..., Tensor] = starting_value
) -> Engine:
    """The model with its starting weights, spread over the world.

    Args:
        config: of the run.
        world: all ranks; every rank must call it.
        start: called as `starting_value`, once a parameter.
    """
    with torch.device("meta"):
        model = build_model(config)
    return make_engine(
        model,
        kind=config.parallel.engine,
        world=world,
        dtype=_DTYPES[config.train.dtype],
        initialise=partial(start, config=config),
    )


def row_shard(mesh: ContextMesh, *, bucket_len: int) -> RowShard:
    """What the loader reads for this rank in the steps of one length."""
    held = positions(
        bucket_len,
        rank=mesh.cp_rank,
        world_size=mesh.sizes.cp_degree,
        layout=mesh.layout,
    )
    return RowShard(
        dp_rank=mesh.dp_rank,
        dp_degree=mesh.sizes.dp_degree,
        rows=mesh.sizes.rows,
        positions=held.numpy(),
    )


def accumulate_gradients(
    engine: Engine,
    batches: Sequence[Microbatch],
    *,
    mesh: ContextMesh,
    world: World,
    num_targets: int,
) -> Tensor:
    """Forward and backward of a step's microbatches; gradients end up averaged over the ranks.

    Args:
        engine: holds the model; its gradients are empty.
        batches: this rank's share of the step.
        mesh: of the step's length.
        world: all ranks.
        num_targets: of the whole step.

    Returns:
        Sum of the losses of this rank's tokens, a scalar without gradient.
    """
    total = torch.zeros((), device=world.device)
    for index, batch in enumerate(batches):
        with engine.microbatch(last=index == len(batches) - 1):
            loss_sum = engine.model(
                batch.tokens.to(world.device, non_blocking=True),
                targets=batch.targets.to(world.device, non_blocking=True),
                positions=batch.positions.to(world.device, non_blocking=True),
                mesh=mesh,
                cu_seqlens=batch.cu_seqlens,
            )
            (loss_sum * (world.size / num_targets)).backward()
        total += loss_sum.detach()
    return total


def _model_line(run: RunPlan) -> str:
    model = run.config.model
    costs = [
        f"{flops_per_token(model, seq_len=length) / 1e6:,.1f} at {length:,}"
        for length in sorted(run.layouts)[:: max(1, len(run.layouts) - 1)]
    ]
    return (
        f"model: {parameter_count(model):,} parameters; MFLOP a token, forward and backward, "
        f"causal: {', '.join(costs)} tokens"
    )


def _not_finite(step: int, norm: float) -> TrainingError:
    error = TrainingError(
        f"the gradient of step {step} is not finite (norm {norm}); the weights are as they were "
        "before it. Lower optim.lr, or look at the step's data with this seed"
    )
    # The norm is that of all ranks.
    error.on_all_ranks = True
    return error


def _over_ranks(
    *, sums: list[float], largest: list[float], device: torch.device
) -> tuple[list[float], list[float]]:
    """Sums and maxima over all ranks in one collective."""
    own = torch.tensor(sums + largest, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    table = torch.stack(everyone)
    cut = len(sums)
    return table[:, :cut].sum(dim=0).tolist(), table[:, cut:].amax(dim=0).tolist()


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
