"""Packed steps train the same in every world, with and without document masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ringctx.data import Dataset, Documents, Loader
from ringctx.model_cost import step_flops
from ringctx.tracking import StepRecord
from ringctx.trainer import Trainer
from tests.data.packed_steps import PlanByHand, concatenated
from tests.ranks import run_ranks
from tests.tiny import run_plan, world, write_config, write_dataset

# Five rows do not divide, and two rows of a forward are joined.
WORLDS = {
    "2 ranks cp=2, rows joined": (2, ("parallel.cp_degree=2", "parallel.tokens_per_rank=128")),
    "2 ranks dp=2, rows joined": (2, ("parallel.tokens_per_rank=256", "parallel.engine=ddp")),
    "4 ranks cp=2 x dp=2": (4, ("parallel.tokens_per_rank=64", "parallel.layout=striped")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    write_config(tmp_path)
    return tmp_path


def plan_by_hand(dataset: Documents) -> PlanByHand:
    """With masks and without, windows, thetas, and a stage with a rate of its own."""
    settings: list[dict[str, Any]] = [
        {"doc_mask": True},
        {"doc_mask": True, "window": 10, "rope_theta": 300.0},
        {"doc_mask": False, "window": 40, "lr": 0.02, "stage_steps": (2, 5)},
        {"doc_mask": False, "lr": 0.02, "stage_steps": (2, 5)},
        {"doc_mask": True, "lr": 0.02, "stage_steps": (2, 5)},
    ]
    lengths = dataset.lengths.tolist()
    return PlanByHand(
        *(
            concatenated(lengths, rows=5, bucket_len=128, step=step, **own)
            for step, own in enumerate(settings)
        )
    )


# No layout is striped here: neighbouring tokens hand states on.
HYBRIDS = {
    "LLW": ("model.num_layers=3", "model.mixers=LLW", "model.rope_mixers=SWL"),
    "LLLS by data": (
        "model.num_layers=4",
        "model.mixers=LLLS",
        "model.window=null",
        "model.sinks=0",
        "model.decay_style=data",
    ),
}


def _train(folder: Path, overrides: tuple[str, ...]) -> list[StepRecord]:
    overrides = ("tracking.peak_flops=1e12", *overrides)
    trainer = Trainer(run_plan(folder, *overrides, world_size=dist.get_world_size()), world=world())
    plan = plan_by_hand(trainer.run.dataset)
    loader = Loader(trainer.run.dataset, plan, shard_for=trainer.loader._shard_for)
    return [trainer.train_step(plan.step(t), loader.step(t)) for t in range(5)]


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[StepRecord]:
    folder = tmp_path_factory.mktemp("one-rank")
    write_dataset(folder)
    write_config(folder)
    # A row a forward: no document of another row is near.
    return run_ranks(1, _train, folder, ("parallel.tokens_per_rank=128",))[0]


@pytest.mark.proves("trainer: packed steps equal one rank's", on="CPU/gloo")
@pytest.mark.parametrize("name", WORLDS)
def test_losses_of_packed_steps_depend_on_no_layout(
    folder: Path, one_rank: list[StepRecord], name: str
) -> None:
    world_size, overrides = WORLDS[name]
    records = run_ranks(world_size, _train, folder, overrides)[0]
    losses = [record.loss for record in records]
    np.testing.assert_allclose(losses, [record.loss for record in one_rank], rtol=1e-4)
    norms = [record.grad_norm for record in records]
    np.testing.assert_allclose(norms, [record.grad_norm for record in one_rank], rtol=1e-3)


@pytest.fixture(scope="session")
def one_rank_hybrids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[StepRecord]]:
    folder = tmp_path_factory.mktemp("one-rank")
    write_dataset(folder)
    write_config(folder)
    return {name: run_ranks(1, _train, folder, own)[0] for name, own in HYBRIDS.items()}


@pytest.mark.proves("trainer: packed steps of a hybrid equal one rank's", on="CPU/gloo")
@pytest.mark.parametrize(("engine", "layout"), [("ddp", "zigzag"), ("fsdp2", "contiguous")])
@pytest.mark.parametrize("name", HYBRIDS)
def test_packed_steps_of_a_hybrid_train_as_on_one_rank(
    folder: Path,
    one_rank_hybrids: dict[str, list[StepRecord]],
    name: str,
    engine: str,
    layout: str,
) -> None:
    alone = one_rank_hybrids[name]
    settings = (f"parallel.engine={engine}", f"parallel.layout={layout}", *HYBRIDS[name])
    for tokens_per_rank, degree in ((32, 4), (128, 1)):
        overrides = (f"parallel.tokens_per_rank={tokens_per_rank}", *settings)
        records = run_ranks(4, _train, folder, overrides)[0]
        assert {record.cp_degree for record in records} == {degree}
        losses = [record.loss for record in records]
        np.testing.assert_allclose(losses, [record.loss for record in alone], rtol=1e-4)
        norms = [record.grad_norm for record in records]
        np.testing.assert_allclose(norms, [record.grad_norm for record in alone], rtol=1e-3)


def test_the_records_of_packed_steps_count_documents_and_no_padding(
    folder: Path, one_rank: list[StepRecord]
) -> None:
    run = run_plan(folder)
    plan = plan_by_hand(run.dataset)
    tokens = 4 * 128 + 64
    for t, record in enumerate(one_rank):
        assert record.num_sequences == 5
        assert record.num_documents == len(plan.step(t).pieces)
        assert record.window == plan.step(t).window
        assert record.tokens_per_s * record.step_time_s == pytest.approx(tokens)
        flops = step_flops(run.config.model, plan.step(t))
        assert record.flops_per_s * record.step_time_s == pytest.approx(flops)
        assert record.mfu == pytest.approx(record.flops_per_s / 1e12)
    # Two steps of the run's warm-up, then the stage begins its own.
    assert [record.lr for record in one_rank] == pytest.approx([0.0025, 0.005, 0.005, 0.01, 0.015])


class NoTargets(Dataset):
    """A dataset all of whose loss bits are off."""

    @property
    def has_loss_bits(self) -> bool:
        return True

    def read_loss(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        return np.zeros(int(lengths.sum()), dtype=np.bool_)


def _train_on_no_targets(folder: Path) -> tuple[float, float, bool]:
    trainer = Trainer(run_plan(folder, world_size=2), world=world())
    whole = trainer.run.dataset
    assert isinstance(whole, Dataset)
    dataset = NoTargets(whole.path, whole.manifest)
    step = concatenated(dataset.lengths.tolist(), rows=2, bucket_len=128, doc_mask=True)
    step = type(step)(**{**vars(step), "num_targets": 0})
    loader = Loader(dataset, PlanByHand(step), shard_for=trainer.loader._shard_for)
    record = trainer.train_step(step, loader.step(0))
    finite = all(bool(torch.isfinite(p).all()) for p in trainer.parameters)
    return record.loss, record.grad_norm, finite


def test_a_step_without_any_target_has_loss_0_and_harms_nothing(folder: Path) -> None:
    assert run_ranks(2, _train_on_no_targets, folder) == [(0.0, 0.0, True)] * 2
