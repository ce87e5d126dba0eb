"""The lightning layer: its formula, its decays, reading in pieces, and ranks."""

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ringctx.config import DecayStyle
from ringctx.errors import ConfigError, LayoutError
from ringctx.layers import RotaryTable, rotary_table, rotate
from ringctx.lightning_layer import LightningAttention
from ringctx.ops.naive_lightning import naive_recurrent
from ringctx.parallel import positions, shard
from ringctx.parallel.comm import Group, SoloGroup, group_rank, group_size
from tests.ranks import run_ranks
from tests.tolerances import assert_close

STYLES = get_args(DecayStyle)
DIM, HEADS, HEAD_DIM = 20, 3, 6


def layer_of(style: Any, **options: Any) -> LightningAttention:
    torch.manual_seed(1)
    sizes = {"num_heads": HEADS, "head_dim": HEAD_DIM, "layer": 1, "num_layers": 4}
    layer = LightningAttention(DIM, decay_style=style, **(sizes | options)).double()
    with torch.no_grad():
        layer.norm.weight.add_(0.1 * torch.randn(HEAD_DIM))
    return layer


def table(at: Tensor) -> RotaryTable:
    return rotary_table(at, head_dim=HEAD_DIM, theta=1e4)


def tokens(length: int, *, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def whole(layer: LightningAttention, x: Tensor, *, rotates: bool = False, **options: Any) -> Tensor:
    rotary = table(torch.arange(x.shape[1])) if rotates else None
    out: Tensor = layer(x, group=SoloGroup(), rotary=rotary, **options)
    return out


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_the_layer_is_the_recurrence_between_its_matrices(style: str, rotates: bool) -> None:
    layer, x = layer_of(style), tokens(70)
    q, k, v = (part(x).unflatten(-1, (HEADS, HEAD_DIM)) for part in (layer.q, layer.k, layer.v))
    q, k = F.silu(q), F.silu(k)
    if rotates:
        q, k = (rotate(part, table(torch.arange(70))) for part in (q, k))
    mixed, _ = naive_recurrent(q, k, v, log_decay=layer.log_decay(x).double())
    rms = mixed.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    heads = (mixed / rms * layer.norm.weight).flatten(-2) * layer.gate(x).sigmoid()
    assert_close(whole(layer, x, rotates=rotates), layer.out(heads))


def test_decay_by_data_is_that_of_alibi_where_nothing_was_learned_and_never_grows() -> None:
    x = tokens(9)
    learned, fixed = layer_of("data"), layer_of("alibi")
    alibi = torch.tensor([-(2 ** (-8 * (h + 1) / HEADS)) for h in range(HEADS)])
    torch.testing.assert_close(fixed.log_decay(x), alibi)
    assert learned.decay is not None
    by_hand = alibi.double() * torch.log1p(learned.decay(x).exp()) / math.log(2)
    torch.testing.assert_close(learned.log_decay(x), by_hand, rtol=1e-6, atol=0)
    assert learned.log_decay(100 * x).max() <= 0
    nn.init.zeros_(learned.decay.weight)
    torch.testing.assert_close(learned.log_decay(x), alibi.double().expand(2, 9, HEADS))


def test_packed_documents_do_not_see_one_another() -> None:
    layer, x = layer_of("data"), tokens(40)
    borders = torch.tensor([0, 1, 23, 23, 40], dtype=torch.int32)
    apart = torch.cat([whole(layer, part) for part in x.split((1, 22, 17), dim=1)], 1)
    assert_close(whole(layer, x, cu_seqlens=borders), apart)


def cut(x: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Pieces and their positions; the rest in single tokens."""
    singles = [1] * (x.shape[1] - sum(sizes))
    at = torch.arange(x.shape[1]).split([*sizes, *singles])
    return list(zip(x.split([*sizes, *singles], dim=1), at, strict=True))


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_pieces_and_single_tokens_equal_the_whole_with_every_gradient(
    style: str, rotates: bool
) -> None:
    layer, x = layer_of(style), tokens(95)
    again, y = copy.deepcopy(layer), x.clone().requires_grad_()
    x.requires_grad_()
    state, outs = None, []
    for piece, at in cut(y, (1, 63, 2, 17)):
        rotary = table(at) if rotates else None
        out, state = again.extend(piece, state=state, rotary=rotary)
        assert state.dtype == torch.float64
        outs.append(out)
    expected = whole(layer, x, rotates=rotates)
    assert_close(torch.cat(outs, 1), expected)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    torch.cat(outs, 1).backward(grad)
    for mine, theirs in zip((y, *again.parameters()), (x, *layer.parameters()), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_fp32_for_narrower_tokens(dtype: torch.dtype) -> None:
    layer, x = layer_of("data").to(torch.float32), tokens(5).to(dtype)
    out, state = layer.extend(x)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    out, state = layer.extend(x[:, :1], state=state)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("style", STYLES)
def test_decays_are_no_weights_and_a_layer_from_the_meta_device_has_them(style: str) -> None:
    layer, x = layer_of(style), tokens(8)
    with torch.device("meta"):
        blank = layer_of(style)
    assert [name for name, _ in blank.named_buffers()] == []
    assert ("decay.weight" in blank.state_dict()) == (style == "data")
    blank.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(whole(blank, x), whole(layer, x))


def test_a_layer_first_used_in_inference_mode_can_be_trained() -> None:
    layer, x = layer_of("data"), tokens(8)
    with torch.inference_mode():
        whole(layer, x)
    whole(layer, x).sum().backward()
    assert layer.q.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"head_dim": None}, "dim=20 is not divisible by num_heads=3; pass head_dim"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"head_dim": 0}, "head_dim=0 must be at least 1, or None for dim / num_heads"),
        ({"layer": 4}, "layer=4 is not one of num_layers=4"),
        ({"backend": "cuda"}, "backend='cuda' is unknown; choose one of torch, triton, fla"),
        ({"decay_style": "fast"}, "'fast' is unknown; choose one of alibi, retnet, tnl, none, da"),
    ],
    ids=str,
)
def test_what_makes_no_layer_is_refused(options: dict[str, Any], message: str) -> None:
    options = {"num_heads": 3, "num_layers": 4, "head_dim": 4} | options
    with pytest.raises(ConfigError, match=message):
        LightningAttention(20, **options)


BORDERS = (0, 5, 6, 19, 24)


def _differentiate(
    group: Group, style: str, *, layout: Any, packed: bool, compiled: bool = False
) -> list[Tensor]:
    """This rank's shard of the output, and all gradients, of the input its shard."""
    rank, world_size = group_rank(group), group_size(group)
    torch.manual_seed(5)
    x, grad = tokens(24), tokens(24)
    spread = {"rank": rank, "world_size": world_size, "layout": layout}
    at = positions(24, **spread)
    mine = shard(x, **spread, dim=1).clone().requires_grad_()
    layer = layer_of(style)

    def block(x: Tensor) -> Tensor:
        borders = torch.tensor(BORDERS, dtype=torch.int32) if packed else None
        mixed = layer(x * 2, group=group, layout=layout, rotary=table(at), cu_seqlens=borders)
        out: Tensor = x + mixed.sin()
        return out

    call = torch.compile(block, backend="aot_eager") if compiled else block
    out = call(mine)
    out.backward(shard(grad, **spread, dim=1))
    gradients = [parameter.grad for parameter in layer.parameters()]
    assert mine.grad is not None
    return [out.detach(), mine.grad, *(grad for grad in gradients if grad is not None)]


def _on_rank(style: str, layout: str, packed: bool) -> list[Tensor]:
    assert dist.group.WORLD is not None
    return _differentiate(dist.group.WORLD, style, layout=layout, packed=packed)


@pytest.mark.proves("lightning layer over ranks, forward and backward", on="CPU/gloo")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("world_size", "style"), [(2, "data"), (3, "alibi"), (4, "data"), (4, "tnl")]
)
def test_ranks_together_give_the_outputs_and_gradients_of_one(
    world_size: int, style: str, layout: str, packed: bool
) -> None:
    expected = _differentiate(SoloGroup(), style, layout="contiguous", packed=packed)
    ranks = run_ranks(world_size, _on_rank, style, layout, packed)
    for index, oracle in enumerate(expected):
        for rank, found in enumerate(ranks):
            if index < 2:
                own = shard(oracle, rank=rank, world_size=world_size, layout=layout, dim=1)
                assert_close(found[index], own)
        if index >= 2:
            assert_close(torch.stack([found[index] for found in ranks]).sum(0), oracle)


def _compiled_and_not(style: str) -> tuple[list[Tensor], list[Tensor]]:
    assert dist.group.WORLD is not None
    # The compiler warns about its own doings.
    warnings.simplefilter("ignore")
    eager, compiled = (
        _differentiate(dist.group.WORLD, style, layout="zigzag", packed=True, compiled=compiled)
        for compiled in (False, True)
    )
    return eager, compiled


@pytest.mark.slow
def test_a_compiled_block_around_it_gives_the_same_numbers() -> None:
    for eager, compiled in run_ranks(2, _compiled_and_not, "data"):
        for a, b in zip(eager, compiled, strict=True):
            assert_close(b, a)


def test_striped_shards_are_refused() -> None:
    with pytest.raises(Exception, match="striped"):
        run_ranks(2, _on_rank, "alibi", "striped", False)


def test_wrong_shapes_are_told_by_the_attention_itself() -> None:
    layer = layer_of("alibi")
    with pytest.raises(LayoutError):
        layer.extend(tokens(3), state=torch.zeros(2, HEADS, HEAD_DIM, HEAD_DIM + 1).double())
