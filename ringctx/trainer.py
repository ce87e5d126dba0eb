"""The loop around the training step: updates, metrics, checkpoints."""

import logging
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from ringctx.by_length import by_length, length_table
from ringctx.checkpoint import load_checkpoint, save_checkpoint, set_aside_later
from ringctx.config_file import config_to_dict, config_to_yaml
from ringctx.data import Loader, Microbatch, RowShard, Step
from ringctx.errors import ConfigError, TrainingError
from ringctx.layout_table import layout_table
from ringctx.model_cost import flops_per_token, parameter_count, step_flops, step_tokens
from ringctx.ops.losses import IGNORE_INDEX
from ringctx.optim import learning_rate, make_optimizer
from ringctx.parallel.agreement import agree_on_first
from ringctx.parallel.comm import record_traffic
from ringctx.parallel.mesh import Mesh, World
from ringctx.parallel.model_states import clip_gradients
from ringctx.resume import Beginning, checkpoint_folder
from ringctx.run_plan import RunPlan
from ringctx.tracking import StepRecord, Tracker, read_metrics
from ringctx.train_step import accumulate_gradients, build_engine, row_shard

__all__ = ["Trainer", "start"]

_LOG = logging.getLogger(__name__)


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
            if tracker is not None:
                self._log_by_length()

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
        lr = learning_rate(
            step,
            num_steps=self.run.num_steps,
            optim=optim,
            peak=planned.lr,
            stage_steps=planned.stage_steps,
        )
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
        num_tokens, time_s = step_tokens(planned), largest[0]
        flops_per_s = step_flops(self.run.config.model, planned) / time_s / self.world.size
        peak = self.run.config.tracking.peak_flops
        return StepRecord(
            step=step,
            tokens=self.tokens + num_tokens,
            loss=sums[0] / max(1, planned.num_targets),
            lr=lr,
            grad_norm=norm,
            bucket_len=planned.bucket_len,
            num_sequences=planned.num_rows,
            num_documents=len(planned.pieces),
            window=planned.window,
            cp_degree=mesh.sizes.cp_degree,
            step_time_s=time_s,
            tokens_per_s=num_tokens / time_s,
            flops_per_s=flops_per_s,
            mfu=None if peak is None else flops_per_s / peak,
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

    def _log_by_length(self) -> None:
        stats = by_length(read_metrics(Path(self.run.config.train.run_dir)))
        for line in length_table(stats):
            _LOG.info(line)

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
