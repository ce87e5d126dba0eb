"""Models of several kinds of layers, whole and over ranks: one layout, the same numbers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.config import ModelConfig
from ringctx.layers import rotary_table
from ringctx.mixers import LightningMixer, Rows
from ringctx.model import Transformer, initialise
from ringctx.ops.losses import IGNORE_INDEX
from ringctx.parallel import positions, shard
from ringctx.parallel.comm import Group, SoloGroup, group_rank, group_size
from ringctx.parallel.mesh import context_mesh
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CONFIG = ModelConfig(
    vocab_size=61, dim=24, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=40, mixers="LLLS"
)
HYBRIDS = {
    "LLLS": CONFIG,
    "LLLS, all rotate, tnl": replace(CONFIG, rope_mixers="SWL", decay_style="tnl"),
    "LLW by data": replace(CONFIG, mixers="LLW", window=9, sinks=2, decay_style="data"),
    "L": replace(CONFIG, mixers="L", num_kv_heads=4, decay_style="retnet"),
}
ROW = 32
BORDERS = (0, 3, 4, 21, ROW)


def build(config: ModelConfig, **options: Any) -> Transformer:
    model = Transformer(config, dtype=torch.float64, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initialise(name, parameter.shape, config=config, seed=3))
    return model


def _loss_and_gradients(
    group: Group, config: ModelConfig, settings: dict[str, Any], *, packed: bool
) -> dict[str, Tensor]:
    """Of this rank's tokens: the loss, and the gradient of every parameter."""
    mesh = context_mesh(group, **settings)
    generator = torch.Generator().manual_seed(4)
    row = torch.randint(0, 61, (2, ROW + 1), generator=generator)
    tokens, targets = row[:, :-1], row[:, 1:].clone()
    if packed:
        targets[:, [border - 1 for border in BORDERS[1:]]] = IGNORE_INDEX
    spread: Any = {
        "rank": group_rank(group),
        "world_size": group_size(group),
        "layout": mesh.layout,
    }
    model = build(config, recompute=packed)
    loss = model(
        shard(tokens, **spread, dim=1),
        targets=shard(targets, **spread, dim=1),
        positions=positions(ROW, **spread),
        mesh=mesh,
        cu_seqlens=BORDERS if packed else None,
        window=11,
    )
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def _on_rank(config: ModelConfig, settings: dict[str, Any], packed: bool) -> dict[str, Tensor]:
    assert dist.group.WORLD is not None
    return _loss_and_gradients(dist.group.WORLD, config, settings, packed=packed)


@pytest.mark.proves("hybrid model over ranks: loss and every gradient", on="CPU/gloo")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, {"layout": "contiguous"}),
        (4, {"state_exchange": "ring"}),
        (4, {"ulysses_degree": 2, "state_exchange": "all_gather"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_over_ranks_has_the_loss_and_gradients_of_one(
    name: str, world_size: int, settings: dict[str, Any], packed: bool
) -> None:
    expected = _loss_and_gradients(SoloGroup(), HYBRIDS[name], {}, packed=packed)
    ranks = run_ranks(world_size, _on_rank, HYBRIDS[name], settings, packed)
    for entry, oracle in expected.items():
        assert_close(torch.stack([found[entry] for found in ranks]).sum(0), oracle)


@pytest.mark.parametrize("letters", ["SW", "SWL"])
def test_only_layers_of_named_kinds_are_told_positions(letters: str) -> None:
    config = replace(CONFIG, rope_mixers=letters)
    mixer = LightningMixer(config, 1).double()
    x = torch.randn(2, 19, 24, dtype=torch.float64)

    def out(first: int) -> Tensor:
        at = torch.arange(first, first + 19) ** 2
        rotary = rotary_table(at, head_dim=6, theta=1e4)
        mesh = context_mesh(SoloGroup())
        mixed: Tensor = mixer(x, Rows(rotary=rotary, mesh=mesh, cu_seqlens=None, window=None))
        return mixed

    assert torch.equal(out(0), out(7)) == (letters == "SW")
    assert torch.equal(out(0), mixer.lightning(x, group=SoloGroup())) == (letters == "SW")


def test_the_layers_of_a_pattern_have_the_decays_of_their_depth() -> None:
    model = build(replace(CONFIG, decay_style="tnl"))
    x = torch.zeros(1, 1, 24)
    mixers = [block.get_submodule("mixer") for block in model.layers]
    decays = [mixer.lightning.log_decay(x) for mixer in mixers if isinstance(mixer, LightningMixer)]
    assert len(decays) == 3
    for earlier, later in pairwise(decays):
        assert (later > earlier).all(), "later layers forget less"


def test_matrices_that_write_into_the_residual_stream_start_smaller_in_every_kind() -> None:
    names: Sequence[str] = [name for name, _ in build(CONFIG).named_parameters()]
    writing = [name for name in names if name.endswith(("out.weight", "down.weight"))]
    assert len(writing) == 2 * 4
    shape = torch.Size((256, 256))
    for name in writing:
        deviation = initialise(name, shape, config=CONFIG, seed=0).std() * 16
        assert abs(deviation * 8**0.5 - 1) < 0.05, name
