"""`verify` must find a layout that is wrong, not only pass one that is right."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ringctx.launch import verify
from ringctx.parallel.mesh import World
from ringctx.train_step import accumulate_gradients
from tests.data.packed_steps import PlanByHand, concatenated
from tests.ranks import run_ranks
from tests.tiny import read_config, run_plan, world, write_config, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    write_config(tmp_path)
    return tmp_path


def _compare(folder: Path, overrides: tuple[str, ...]) -> list[verify.Comparison]:
    run = run_plan(folder, *overrides, world_size=dist.get_world_size())
    return list(verify.compare(run, world=world()))


@pytest.mark.proves("ringctx verify: every layout and engine equals one process", on="CPU/gloo")
@pytest.mark.parametrize(("engine", "ulysses_degree"), [("ddp", 1), ("fsdp2", 2)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_every_layout_equals_one_process(
    folder: Path, layout: str, engine: str, ulysses_degree: int
) -> None:
    overrides = (
        "parallel.tokens_per_rank=32",
        f"parallel.layout={layout}",
        f"parallel.engine={engine}",
        f"parallel.ulysses_degree={ulysses_degree}",
    )
    results = run_ranks(4, _compare, folder, overrides)
    assert results[0] == results[3]
    assert [(r.bucket_len, r.cp_degree) for r in results[0]] == [
        (16, 1),
        (32, 1),
        (64, 2),
        (128, 4),
    ]
    for result in results[0]:
        assert result.loss_difference < 1e-5
        assert result.largest < 1e-4, result.parameter


def _compare_packed(folder: Path, overrides: tuple[str, ...]) -> list[verify.Comparison]:
    run = run_plan(folder, *overrides, world_size=dist.get_world_size())
    lengths = run.dataset.lengths.tolist()
    plan = PlanByHand(
        concatenated(lengths, rows=3, bucket_len=128, step=0, doc_mask=True),
        concatenated(lengths, rows=3, bucket_len=64, step=1, doc_mask=False, window=9),
        concatenated(lengths, rows=3, bucket_len=128, step=2, doc_mask=True),
        concatenated(lengths, rows=3, bucket_len=128, step=3, doc_mask=True, rope_theta=50.0),
    )
    run = replace(run, plan=plan, num_steps=4)  # type: ignore[arg-type]
    return list(verify.compare(run, world=world()))


@pytest.mark.proves("ringctx verify: packed steps, windows and thetas", on="CPU/gloo")
def test_packed_steps_are_compared_once_a_length_and_again_where_the_last_differs(
    folder: Path,
) -> None:
    overrides = ("parallel.tokens_per_rank=64", "parallel.ulysses_degree=2")
    results = run_ranks(4, _compare_packed, folder, overrides)[0]
    assert [(r.bucket_len, r.cp_degree, r.window) for r in results] == [
        (64, 1, 9),
        (128, 2, None),
        (128, 2, None),
    ]
    assert results[1].loss != results[2].loss, "theta counts"
    for result in results:
        assert result.loss_difference < 1e-5
        assert result.largest < 1e-4, result.parameter


@pytest.mark.proves("ringctx verify: hybrids of lightning and softmax", on="CPU/gloo")
@pytest.mark.parametrize("decay_style", ["alibi", "data"])
@pytest.mark.parametrize("compared", ["rows of one document", "packed rows"])
def test_a_hybrid_equals_one_process(folder: Path, compared: str, decay_style: str) -> None:
    overrides = (
        "parallel.tokens_per_rank=32",
        "parallel.ulysses_degree=2",
        "model.mixers=LLW",
        "model.num_layers=3",
        f"model.decay_style={decay_style}",
    )
    compare = _compare if compared == "rows of one document" else _compare_packed
    results = run_ranks(4, compare, folder, overrides)[0]
    assert max(result.cp_degree for result in results) == 4
    for result in results:
        assert result.loss_difference < 1e-5
        assert result.largest < 1e-4, result.parameter
        of_decay = [name for name in result.differences if "decay" in name]
        assert len(of_decay) == (2 if decay_style == "data" else 0)


def halved(*args: object, world: World, **options: object) -> torch.Tensor:
    """Gradients half as large as they should be on two ranks."""
    smaller = World(rank=world.rank, size=1, device=world.device)
    return accumulate_gradients(*args, world=smaller, **options)  # type: ignore[arg-type]


def test_a_wrong_loss_scale_is_found(folder: Path) -> None:
    results = run_ranks(2, _compare_with_a_wrong_scale, folder)
    assert all(abs(result.largest - 0.5) < 0.01 for result in results[0])


def _compare_with_a_wrong_scale(folder: Path) -> list[verify.Comparison]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "accumulate_gradients", halved)
        return _compare(folder, ("parallel.tokens_per_rank=64",))


def _verify_with_a_wrong_scale(folder: Path) -> int:
    config = read_config(folder, "parallel.tokens_per_rank=64", "train.steps=5")
    right = verify._verify(config, world())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "accumulate_gradients", halved)
        return right * 10 + verify._verify(config, world())


def test_the_exit_code_is_1_if_and_only_if_something_differs(folder: Path) -> None:
    assert run_ranks(2, _verify_with_a_wrong_scale, folder) == [1, 1]


def test_gradients_that_are_0_in_both_do_not_differ() -> None:
    nothing, something = torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])
    assert verify._difference(nothing, nothing) == 0
    assert verify._difference(something, nothing) > 1e6


def test_a_gradient_that_is_no_number_is_the_largest_difference() -> None:
    result = verify.Comparison(
        bucket_len=16, cp_degree=1, window=None, loss=1.0, loss_alone=1.0,
        differences={"a": 0.5, "b": float("nan"), "c": 0.1},
    )  # fmt: skip
    assert result.parameter == "b"
    assert list(verify._wrong_gradients(result, 0.2)) == ["    a: 5.0e-01\n", "    b: nan\n"]
