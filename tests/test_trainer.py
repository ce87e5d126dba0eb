"""The same losses whatever the layout and engine, also across a stop and a resume."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ringctx.config import TopologyConfig
from ringctx.errors import TrainingError
from ringctx.parallel import ring_attention
from ringctx.tracking import read_metrics
from ringctx.train_step import accumulate_gradients
from ringctx.trainer import Trainer
from tests.ranks import RankError, run_ranks
from tests.tiny import begin, run_plan, train_here, world, write_config, write_dataset

LAYOUTS = {
    "1 rank": (1, ()),
    "2 ranks cp=2": (2, ("parallel.tokens_per_rank=64", "parallel.cp_degree=2")),
    "2 ranks dp=2": (2, ()),
    "4 ranks cp=2 x dp=2": (4, ("parallel.tokens_per_rank=64", "parallel.cp_degree=2")),
    "4 ranks cp follows length": (4, ("parallel.tokens_per_rank=32",)),
    "4 ranks cp=4 with ulysses=2": (
        4,
        ("parallel.tokens_per_rank=32", "parallel.ulysses_degree=2"),
    ),
    "3 ranks with rows to fill up": (3, ()),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    write_config(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def one_rank_losses(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float64]:
    folder = tmp_path_factory.mktemp("one-rank")
    write_dataset(folder)
    write_config(folder)
    return train(1, folder, "parallel.engine=ddp")


def _train(folder: Path, run: str, overrides: tuple[str, ...]) -> None:
    train_here(folder, *overrides, f"train.run_dir={folder / run}")


def train(world_size: int, folder: Path, *overrides: str, run: str = "run") -> NDArray[np.float64]:
    """Losses of the run so far."""
    run_ranks(world_size, _train, folder, run, overrides)
    return np.array([record["loss"] for record in read_metrics(folder / run)])


@pytest.mark.proves("trainer: losses equal one rank's over 20 steps", on="CPU/gloo")
@pytest.mark.proves("trainer: resume in the same layout is bit-equal", on="CPU/gloo")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_depend_on_no_layout_or_engine_and_a_resume_half_way_changes_no_bit(
    folder: Path, one_rank_losses: NDArray[np.float64], layout: str, engine: str
) -> None:
    world_size, overrides = LAYOUTS[layout]
    overrides = (f"parallel.engine={engine}", "checkpoint.every=10", *overrides)
    losses = train(world_size, folder, *overrides)
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.3, "it learns"
    np.testing.assert_allclose(losses, one_rank_losses, rtol=1e-4)

    half = folder / "half/checkpoints/step-00000010"
    shutil.copytree(folder / "run/checkpoints/step-00000010", half)
    resumed = train(world_size, folder, *overrides, run="half")
    assert resumed.tolist() == losses[10:].tolist()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_longer_pattern_gives_the_same_losses_in_every_layout(folder: Path, engine: str) -> None:
    settings = (
        f"parallel.engine={engine}",
        "model.mixers=SSSW",
        "model.num_layers=5",
        "train.steps=6",
        "curriculum.odds=uniform",
    )
    layouts = [(), ("parallel.tokens_per_rank=64",), ("parallel.tokens_per_rank=64",)]
    losses = [
        train(world_size, folder, *settings, *overrides, run=f"run-{world_size}")
        for world_size, overrides in zip((1, 2, 4), layouts, strict=True)
    ]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)
    lengths = {record["cp_degree"] for record in read_metrics(folder / "run-4")}
    assert lengths == {1, 2}


HYBRIDS = {
    "LLLS": ("model.mixers=LLLS", "model.num_layers=4", "model.window=null", "model.sinks=0"),
    "LLW by data, all rotate": (
        "model.mixers=LLW",
        "model.num_layers=3",
        "model.decay_style=data",
        "model.rope_mixers=SWL",
    ),
}


@pytest.fixture(scope="session")
def hybrid_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[np.float64]]:
    """Of one rank, by hybrid."""
    losses = {}
    for name, settings in HYBRIDS.items():
        folder = tmp_path_factory.mktemp("one-rank")
        write_dataset(folder)
        write_config(folder)
        losses[name] = train(1, folder, "parallel.engine=ddp", "train.steps=12", *settings)
    return losses


@pytest.mark.slow
@pytest.mark.proves("trainer: a hybrid has one rank's losses, and resumes", on="CPU/gloo")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_trains_as_on_one_rank_and_a_resume_half_way_changes_no_bit(
    folder: Path, hybrid_losses: dict[str, NDArray[np.float64]], name: str, engine: str
) -> None:
    settings = (
        f"parallel.engine={engine}",
        "parallel.tokens_per_rank=32",
        "train.steps=12",
        "checkpoint.every=6",
        *HYBRIDS[name],
    )
    losses = train(4, folder, *settings)
    assert losses[-1] < losses[0] - 0.3, "it learns"
    np.testing.assert_allclose(losses, hybrid_losses[name], rtol=1e-4)
    degrees = {record["cp_degree"] for record in read_metrics(folder / "run")}
    assert degrees == {1, 2, 4}, "cp follows the length"

    half = folder / "half/checkpoints/step-00000006"
    shutil.copytree(folder / "run/checkpoints/step-00000006", half)
    resumed = train(4, folder, *settings, run="half")
    assert resumed.tolist() == losses[6:].tolist()


def test_a_hybrid_resumes_on_another_world_and_engine(
    folder: Path, hybrid_losses: dict[str, NDArray[np.float64]]
) -> None:
    for world_size, settings in (
        (4, ("parallel.engine=fsdp2", "parallel.tokens_per_rank=32", "train.stop_after=6")),
        (2, ("parallel.engine=ddp", "parallel.tokens_per_rank=64")),
    ):
        losses = train(world_size, folder, "train.steps=12", *settings, *HYBRIDS["LLLS"])
    np.testing.assert_allclose(losses, hybrid_losses["LLLS"], rtol=1e-4)


@pytest.mark.proves("trainer: resume on another world size or engine", on="CPU/gloo")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("2 ranks cp=2", "fsdp2"), ("4 ranks cp follows length", "fsdp2")),
        (("4 ranks cp=2 x dp=2", "fsdp2"), ("1 rank", "ddp")),
        (("2 ranks dp=2", "ddp"), ("3 ranks with rows to fill up", "fsdp2")),
    ],
    ids=str,
)
def test_a_resume_on_another_world_keeps_the_trajectory(
    folder: Path,
    one_rank_losses: NDArray[np.float64],
    before: tuple[str, str],
    after: tuple[str, str],
) -> None:
    for (layout, engine), stop in ((before, "train.stop_after=10"), (after, "train.steps=20")):
        world_size, overrides = LAYOUTS[layout]
        losses = train(world_size, folder, f"parallel.engine={engine}", stop, *overrides)
    np.testing.assert_allclose(losses, one_rank_losses, rtol=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_bf16_stays_close_to_fp32(
    folder: Path, one_rank_losses: NDArray[np.float64], engine: str, recompute: str
) -> None:
    losses = train(
        2,
        folder,
        "train.dtype=bf16",
        f"train.recompute={recompute}",
        f"parallel.engine={engine}",
        "parallel.tokens_per_rank=64",
        "checkpoint.every=10",
    )
    np.testing.assert_allclose(losses, one_rank_losses, rtol=0.02)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_in_bf16_stays_close_to_fp32(
    folder: Path, hybrid_losses: dict[str, NDArray[np.float64]], name: str
) -> None:
    settings = ("train.dtype=bf16", "train.recompute=layer", "parallel.tokens_per_rank=64")
    losses = train(2, folder, *settings, "train.steps=12", *HYBRIDS[name])
    np.testing.assert_allclose(losses, hybrid_losses[name], rtol=0.02)


# The S layer lets rank 1 have a quarter of the row, which is all of rank 0's that it needs, and
# rank 0 half a row. Windows of 24 reach 23 tokens over a border, and rank 1 sees 2 sinks.
SEEN = {"S": 32 + 64, "W": 25 + 23}


@pytest.mark.parametrize("mixers", ["SW", "S"])
def test_metrics_have_the_fields_and_the_sums_that_they_promise(folder: Path, mixers: str) -> None:
    plain = ("model.mixers=S", "model.window=null", "model.sinks=0") if mixers == "S" else ()
    train(2, folder, "parallel.tokens_per_rank=64", "parallel.schedule=one_way", *plain)
    records = read_metrics(folder / "run")
    assert [record["step"] for record in records] == list(range(20))
    assert [record["tokens"] for record in records] == [256 * (i + 1) for i in range(20)]
    for record in records:
        length = record["bucket_len"]
        assert record["cp_degree"] == max(1, length // 64)
        assert record["num_sequences"] == 256 // length
        # K and V of a token are 2 heads of 8, fp32. They move forward and backward, and their fp32
        # gradients move home; in 2 rows and 2 layers.
        tokens = sum(SEEN[letter] for letter in (mixers * 2)[:2])
        ring = 2 * 3 * tokens * 2 * 2 * 8 * 4
        assert record["moved_bytes"] == (ring if length == 128 else 0)
        assert record["max_memory_bytes"] > 2**20
        assert record["tokens_per_s"] > 0


def _ring_calls(folder: Path, overrides: tuple[str, ...]) -> list[dict[str, Any]]:
    """The settings of every call of the ring in one step."""
    run = run_plan(folder, *overrides, world_size=2)
    trainer = Trainer(run, world=world())
    step = next(t for t in range(run.num_steps) if run.plan.bucket_len(t) == 128)
    # Not `from ringctx.parallel import`: there the module's name is that of its function.
    caller = import_module("ringctx.parallel.context_attention")
    with patch.object(caller, "ring_attention", wraps=ring_attention) as ring:
        trainer.train_step(run.plan.step(step), trainer.loader.step(step))
    told = ("window", "sinks", "schedule", "topology")
    return [{name: call.kwargs[name] for name in told} for call in ring.call_args_list]


def test_schedule_wiring_and_each_layers_window_reach_the_ring(folder: Path) -> None:
    overrides = (
        "parallel.tokens_per_rank=64",
        "parallel.schedule=two_way",
        "parallel.topology=cables",
        "parallel.topology.link_gbit=3",
    )
    calls = run_ranks(2, _ring_calls, folder, overrides)[1]
    assert [(call["window"], call["sinks"]) for call in calls] == [(None, 0), (24, 2)] * 2
    for call in calls:
        assert call["schedule"] == "two_way"
        assert call["topology"] == TopologyConfig(kind="cables", link_gbit=3)


def test_a_hybrid_moves_a_state_a_part_and_keys_for_its_softmax_layers(folder: Path) -> None:
    ways = ("parallel.schedule=one_way", "parallel.state_exchange=ring")
    few = ("curriculum.first_step=longest", "train.steps=4")
    train(2, folder, "parallel.tokens_per_rank=64", *ways, *few, *HYBRIDS["LLLS"])
    records = read_metrics(folder / "run")
    assert records[0]["bucket_len"] == 128
    for record in records:
        # Of zigzag's 4 parts rank 0 has the first and the last: a state goes to rank 1 and one
        # comes back, 4 heads of 8 x 8 in fp32, in 3 layers and 2 rows; backward the same way home.
        states = 2 * 2 * 4 * 8 * 8 * 4 * 3 * 2
        # As below, of one layer.
        keys = 2 * 3 * SEEN["S"] * 2 * 2 * 8 * 4
        assert record["moved_bytes"] == (states + keys if record["bucket_len"] == 128 else 0)


def _train_on_nan(folder: Path) -> None:
    trainer = Trainer(run_plan(folder, "parallel.engine=ddp", world_size=2), world=world())
    if dist.get_rank() == 1:
        with torch.no_grad():
            trainer.parameters[1][:2] = float("nan")
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    with pytest.raises(TrainingError, match="the gradient of step 0 is not finite"):
        trainer.train_step(trainer.run.plan.step(0), trainer.loader.step(0))
    torch.testing.assert_close(trainer.parameters, before, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_the_update(
    folder: Path,
) -> None:
    run_ranks(2, _train_on_nan, folder)


def _begin_with(folder: Path, overrides: tuple[str, ...]) -> None:
    begin(folder, overrides[dist.get_rank()])


@pytest.mark.parametrize(
    ("name", "values"), [("train.seed", (0, 1)), ("optim.lr", (0.01, 0.02))], ids=str
)
def test_ranks_with_different_settings_all_stop_before_training(
    folder: Path, name: str, values: tuple[float, float]
) -> None:
    message = f"do not agree:\n(.*\n)*{name}: rank 0 has {values[0]}, rank 1 has {values[1]}"
    with pytest.raises(RankError, match=message):
        run_ranks(2, _begin_with, folder, tuple(f"{name}={value}" for value in values))


def _losses_with_gains(folder: Path, engine: str) -> tuple[float, float]:
    """Loss of step 0 with all gains at 1, and a little above: less than a bf16 step at 1."""
    run = run_plan(folder, "train.dtype=bf16", f"parallel.engine={engine}", world_size=2)
    trainer = Trainer(run, world=world())
    step, losses = run.plan.step(0), []
    for gain in (1.0, 1.0035):
        with torch.no_grad():
            for parameter in trainer.parameters:
                if parameter.ndim == 1:
                    parameter.fill_(gain)
        total = accumulate_gradients(
            trainer.engine,
            trainer.loader.step(0),
            mesh=trainer.mesh.for_length(step.bucket_len),
            world=trainer.world,
            num_targets=step.num_targets,
        )
        dist.all_reduce(total)
        losses.append(float(total) / step.num_targets)
    return losses[0], losses[1]


def test_gains_of_norms_stay_fp32_in_a_bf16_run_under_both_engines(folder: Path) -> None:
    moved = {}
    for engine in ("ddp", "fsdp2"):
        before, after = run_ranks(2, _losses_with_gains, folder, engine)[0]
        moved[engine] = after - before
    assert moved["ddp"] != 0
    np.testing.assert_allclose(moved["fsdp2"], moved["ddp"], rtol=0.05)


def test_a_resume_with_other_tokens_per_step_takes_the_rest_of_the_plan(folder: Path) -> None:
    whole = len(run_plan(folder, "train.steps=null").plan)
    train(2, folder, "train.steps=null", "train.stop_after=10")
    for tokens, steps in ((128, 2 * (whole - 10)), (512, (whole - 10) // 2)):
        run = f"run-{tokens}"
        shutil.copytree(folder / "run", folder / run)
        train(2, folder, "train.steps=null", f"curriculum.tokens_per_step={tokens}", run=run)
        records = read_metrics(folder / run)
        assert abs(len(records) - 10 - steps) <= 1
        assert records[-1]["lr"] == pytest.approx(1e-3), "the cosine ends with the plan"
        assert records[-1]["tokens"] == 2560 + tokens * (len(records) - 10)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_run_that_took_its_whole_plan_resumes_to_nothing(folder: Path, engine: str) -> None:
    settings = ("train.steps=null", f"parallel.engine={engine}", "curriculum.total_tokens=1024")
    first = train(2, folder, *settings)
    assert len(first) == 4
    assert train(2, folder, *settings).tolist() == first.tolist()
