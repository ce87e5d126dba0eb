"""Several documents in one row, cut over ranks, train as if each were alone."""

from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.data import Microbatch
from ringctx.ops.losses import IGNORE_INDEX
from ringctx.parallel import shard
from ringctx.parallel.comm import SoloGroup
from ringctx.parallel.mesh import ContextMesh, context_mesh
from ringctx.parallel.model_states import whole
from ringctx.run_plan import RunPlan
from ringctx.train_step import accumulate_gradients, build_model, starting_value
from ringctx.trainer import Trainer
from tests.ranks import run_ranks
from tests.tiny import run_plan, world, write_config, write_dataset
from tests.tolerances import assert_close

ROW_LEN = 128
LENGTHS = (37, 1, 26, 50, 14)
MESHES = {
    "2 ranks cp=2": (2, ("parallel.tokens_per_rank=64",)),
    "4 ranks cp=4": (4, ("parallel.tokens_per_rank=32",)),
    "4 ranks cp=4 ulysses=2": (4, ("parallel.tokens_per_rank=32", "parallel.ulysses_degree=2")),
    "4 ranks cp=2 x dp=2": (4, ("parallel.tokens_per_rank=64", "parallel.layout=striped")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    write_config(tmp_path)
    return tmp_path


def documents(dp_rank: int) -> list[Tensor]:
    """Token ids of the documents of one row, one more each than it has targets."""
    rng = np.random.default_rng(dp_rank)
    return [torch.from_numpy(rng.integers(0, 257, size=(1, n))) for n in LENGTHS]


def targets_of(document: Tensor) -> Tensor:
    end = torch.full((1, 1), IGNORE_INDEX)
    return torch.cat([document[:, 1:], end], dim=1)


def packed(row: list[Tensor], mesh: ContextMesh) -> Microbatch:
    """What this rank holds of the row."""

    def local(x: Tensor) -> Tensor:
        cp_degree = mesh.sizes.cp_degree
        return shard(x, rank=mesh.cp_rank, world_size=cp_degree, layout=mesh.layout)

    return Microbatch(
        tokens=local(torch.cat(row, dim=1)),
        targets=local(torch.cat([targets_of(document) for document in row], dim=1)),
        positions=local(torch.arange(ROW_LEN)[None])[0],
        cu_seqlens=(0, *accumulate(LENGTHS)),
    )


def apart(run: RunPlan, rows: list[list[Tensor]], num_targets: int) -> dict[str, Tensor]:
    """Loss and gradients of the documents one by one, by the model in one piece."""
    model = build_model(run.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(starting_value(name, parameter.shape, config=run.config))
    total = torch.zeros(())
    for document in (document for row in rows for document in row):
        loss = model(
            document,
            targets=targets_of(document),
            positions=torch.arange(document.shape[1]),
            mesh=context_mesh(SoloGroup()),
        )
        (loss / num_targets).backward()
        total += loss.detach()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, **grads}


def _compare(folder: Path, overrides: tuple[str, ...]) -> None:
    run = run_plan(folder, *overrides, world_size=dist.get_world_size())
    trainer = Trainer(run, world=world())
    mesh = trainer.mesh.for_length(ROW_LEN)
    assert mesh.sizes.cp_degree > 1
    rows = [documents(dp_rank) for dp_rank in range(mesh.sizes.dp_degree)]
    num_targets = len(rows) * (ROW_LEN - len(LENGTHS))
    loss = accumulate_gradients(
        trainer.engine,
        # Twice, so that gradients also add up over microbatches.
        [packed(rows[mesh.dp_rank], mesh)] * 2,
        mesh=mesh,
        world=trainer.world,
        num_targets=2 * num_targets,
    )
    dist.all_reduce(loss)
    actual = {"loss": loss / 2}
    for name, parameter in trainer.engine.model.named_parameters():
        assert parameter.grad is not None, name
        actual[name.removeprefix("module.")] = whole(parameter.grad)
    expected = apart(run, rows, num_targets)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        # The rounding of a few layers.
        assert_close(actual[name], tensor, scale=10)


@pytest.mark.proves("trainer: a packed row equals its documents one by one", on="CPU/gloo")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_packed_row_over_a_ring_gives_the_loss_and_gradients_of_its_documents(
    folder: Path, mesh: str, engine: str
) -> None:
    world_size, overrides = MESHES[mesh]
    run_ranks(world_size, _compare, folder, (f"parallel.engine={engine}", *overrides))
