"""What other libraries compute, by their own blocks, equals ours on converted values."""

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.ops.lightning.conventions import (
    FLA,
    MINIMAX,
    OPENNLPLAB,
    Convention,
    fla_lightning_log_decay,
)
from ringctx.ops.lightning.decay_styles import log_decay
from ringctx.ops.naive_lightning import naive_recurrent

ALL = {"fla": FLA, "minimax": MINIMAX, "opennlplab": OPENNLPLAB}


def _qkv(tokens: int) -> list[Tensor]:
    shapes = [(2, tokens, 3, 4), (2, tokens, 3, 4), (2, tokens, 3, 5)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def _opennlplab(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """`lightning_attn2`, forward: blocks of 4, `[B, H, T, D]`; out and the state after the last."""
    block = 4
    kv = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    at = torch.arange(block)[:, None]
    diagonal = torch.where(at >= at.T, -slopes * (at - at.T), -torch.inf).exp()
    outs = []
    for start in range(0, q.shape[2], block):
        queries, keys, values = (x[:, :, start : start + block] for x in (q, k, v))
        intra = (queries @ keys.mT * diagonal) @ values
        outs.append(intra + (queries @ kv) * torch.exp(-slopes * at))
        added = (keys * torch.exp(-slopes * (block - at))).mT @ values
        kv = torch.exp(-slopes * block) * kv + added
    return torch.cat(outs, 2), kv


def test_opennlplab_s_blocks_equal_ours_with_its_state_converted() -> None:
    decay = log_decay(3, style="tnl", layer=1, num_layers=4).double()
    q, k, v = _qkv(tokens=12)
    to_theirs = OPENNLPLAB.tensor_to
    theirs, stored = _opennlplab(
        to_theirs(q), to_theirs(k), to_theirs(v), OPENNLPLAB.decay_to(decay)
    )
    ours, state = naive_recurrent(q, k, v, log_decay=decay, scale=OPENNLPLAB.scale(4))
    torch.testing.assert_close(OPENNLPLAB.tensor_from(theirs), ours)
    torch.testing.assert_close(OPENNLPLAB.state_from(stored, log_decay=decay), state)
    torch.testing.assert_close(OPENNLPLAB.state_to(state, log_decay=decay), stored)


def test_minimax_s_layer_equals_ours_with_its_slopes_converted() -> None:
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = minimax.MiniMaxConfig(
        hidden_size=12, num_attention_heads=3, num_key_value_heads=3, head_dim=4, block_size=4,
        num_hidden_layers=5, layer_types=["linear_attention"] * 5, hidden_act="silu",
    )  # fmt: skip
    layer = minimax.MiniMaxLightningAttention(config, layer_idx=2).double()
    # What comes out of the attention itself.
    layer.norm = torch.nn.Identity()
    layer.out_proj = torch.nn.Identity()
    hidden = torch.randn(2, 11, 12, dtype=torch.float64)
    with torch.no_grad():
        theirs, stored = layer(hidden, (hidden, hidden), None)
        projected = layer.act_fn(layer.qkv_proj(hidden)).unflatten(-1, (3, 12))
        gate = layer.output_gate(hidden).sigmoid()
        slopes = layer.get_slope_rate().double()
        q, k, v = projected.split(4, dim=-1)
        decay = MINIMAX.decay_from(slopes)
        ours, state = naive_recurrent(q, k, v, log_decay=decay, scale=MINIMAX.scale(4))
    torch.testing.assert_close(theirs, ours.flatten(2) * gate, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        MINIMAX.state_from(stored, log_decay=decay), state, rtol=1e-6, atol=1e-7
    )
    # 1 - l / (L - 1 + 1e-5) + 1e-5 there; the 1e-5 below moves the decay by 1e-6 of itself.
    expected = log_decay(3, style="tnl", layer=2, num_layers=5)
    torch.testing.assert_close(decay.float(), expected, rtol=3e-6, atol=0)


def test_fla_s_own_decays_are_linear_in_the_head() -> None:
    decay = fla_lightning_log_decay(4, layer=3, num_layers=12)
    torch.testing.assert_close(decay, torch.tensor([0.0, -1.5, -3.0, -4.5]))


@pytest.mark.filterwarnings("ignore")
def test_fla_s_own_decays_are_those_that_it_passes_on() -> None:
    from fla.ops.lightning_attn import chunk as lightning

    seen: dict[str, Any] = {}
    function = lightning.chunk_lightning_attn
    # The same code, with another function where it calls the kernels.
    code = getattr(function, "_torchdynamo_orig_callable", function)
    alone = types.FunctionType(
        code.__code__,
        code.__globals__ | {"chunk_simple_gla": lambda **given: seen.update(given)},
        argdefs=code.__defaults__,
    )
    q, k, v = _qkv(tokens=2)
    alone(q, k, v, layer_idx=3, num_layers=12)
    expected = fla_lightning_log_decay(3, layer=3, num_layers=12)
    torch.testing.assert_close(seen["g_gamma"], expected)
    assert seen["scale"] is None
    assert FLA.scale(4) == 0.5


@pytest.mark.parametrize("convention", ALL.values(), ids=ALL)
def test_there_and_back_is_the_same(convention: Convention) -> None:
    decay = log_decay(3, style="alibi").double()
    state, x = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 7, 3, 4)
    back = convention.state_from(convention.state_to(state, log_decay=decay), log_decay=decay)
    torch.testing.assert_close(back, state)
    assert torch.equal(convention.decay_from(convention.decay_to(decay)), decay)
    assert torch.equal(convention.tensor_from(convention.tensor_to(x)), x)


@pytest.mark.parametrize("convention", ALL.values(), ids=ALL)
def test_decays_of_the_wrong_sign_are_refused(convention: Convention) -> None:
    right = convention.decay_to(log_decay(3, style="alibi"))
    with pytest.raises(LayoutError, match=r"must be [<>]= 0, but one gives .* 0.157; change"):
        convention.decay_from(-right)
    with pytest.raises(LayoutError, match=r"log_decay must be <= 0, but .* 0.157; change"):
        convention.decay_to(-log_decay(3, style="alibi"))
