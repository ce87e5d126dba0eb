"""Padding to a length that divides changes nothing for real tokens, in either pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.ops.naive import naive_attention
from ringctx.parallel import ring_attention, shard, unshard
from ringctx.parallel.comm import Group, group_rank
from ringctx.parallel.layout import LAYOUTS, local_len
from ringctx.parallel.padding import pad_cu_seqlens, pad_to_layout, padded_len, unpad
from tests.tolerances import assert_matches
from tests.virtual_ranks import run_virtual


@given(st.integers(1, 200), st.integers(1, 17), st.sampled_from(LAYOUTS))
def test_gives_the_shortest_length_that_divides(seq_len: int, world_size: int, layout: str) -> None:
    length = padded_len(seq_len, world_size=world_size, layout=layout)
    assert length >= seq_len
    local_len(length, world_size=world_size, layout=layout)
    for shorter in range(seq_len, length):
        with pytest.raises(LayoutError, match="is not divisible by"):
            local_len(shorter, world_size=world_size, layout=layout)


@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from(LAYOUTS), st.integers(0, 2))
def test_unpad_is_the_inverse_and_gradients_flow(
    seq_len: int, world_size: int, layout: str, dim: int
) -> None:
    shape = [2, 3, 2]
    shape[dim] = seq_len
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    padded, was = pad_to_layout(x, world_size=world_size, layout=layout, dim=dim, value=7)
    assert was == seq_len
    assert bool((padded.narrow(dim, seq_len, padded.shape[dim] - seq_len) == 7).all())
    assert torch.equal(unpad(padded, seq_len=was, dim=dim), x)
    weight = torch.randn_like(padded)
    (padded * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight.narrow(dim, 0, seq_len))


def test_what_divides_is_returned_as_it_is() -> None:
    x = torch.arange(12)[None]
    assert pad_to_layout(x, world_size=3, layout="zigzag")[0] is x
    labels, _ = pad_to_layout(x, world_size=5, layout="striped", value=-100)
    assert labels.dtype == torch.int64
    assert labels[0, 12:].tolist() == [-100] * 3


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seq_len", [9, 13, 15])
def test_real_tokens_attend_as_if_nothing_were_padded(
    seq_len: int, layout: str, causal: bool
) -> None:
    world_size = 3
    whole = [torch.randn(2, seq_len, 2, 8, dtype=torch.float64) for _ in range(4)]
    *qkv, grad_out = whole
    oracle_inputs = [x.clone().requires_grad_() for x in qkv]
    oracle, _ = naive_attention(*oracle_inputs, causal=causal)
    oracle_grads = torch.autograd.grad(oracle, oracle_inputs, grad_out)
    place = {"world_size": world_size, "layout": layout}
    # Not causal, the padding is hidden as a document of its own.
    cu_seqlens = None if causal else pad_cu_seqlens(None, seq_len=seq_len, **place)  # type: ignore[arg-type]

    def body(group: Group) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in qkv]
        padded = [pad_to_layout(x, **place)[0] for x in inputs]  # type: ignore[arg-type]
        shards = [shard(x, rank=group_rank(group), **place) for x in padded]  # type: ignore[arg-type]
        out = ring_attention(
            *shards, group=group, layout=layout, causal=causal, cu_seqlens=cu_seqlens
        )
        # The gradient of the padding's outputs is 0, as a loss without them gives.
        grad, _ = pad_to_layout(grad_out, **place)  # type: ignore[arg-type]
        out.backward(shard(grad, rank=group_rank(group), **place))  # type: ignore[arg-type]
        joined = unpad(unshard(out, group=group, layout=layout), seq_len=seq_len)
        return [joined, *(x.grad for x in inputs if x.grad is not None)]

    results = run_virtual(world_size, body)
    for joined, *_ in results:
        assert_matches("out", joined, oracle.detach(), flash=joined)
    for i, (name, expected) in enumerate(zip("qkv", oracle_grads, strict=True), start=1):
        total = torch.stack([result[i] for result in results]).sum(0)
        assert_matches(f"grad_{name}", total, expected, flash=total)


def test_the_padding_becomes_a_document_of_its_own() -> None:
    documents = torch.tensor([0, 4, 13], dtype=torch.int32)
    padded = pad_cu_seqlens(documents, seq_len=13, world_size=2, layout="zigzag")
    assert padded.tolist() == [0, 4, 13, 16]
    assert padded.dtype == torch.int32
    whole = pad_cu_seqlens(documents, seq_len=13, world_size=13, layout="striped")
    assert whole.tolist() == [0, 4, 13]
    alone = pad_cu_seqlens(None, seq_len=5, world_size=2, layout="contiguous")
    assert alone.tolist() == [0, 5, 6]
    assert alone.dtype == torch.int32


def test_rejects_what_cannot_be_padded() -> None:
    with pytest.raises(LayoutError, match="seq_len=0 leaves nothing to pad"):
        pad_to_layout(torch.zeros(1, 0), world_size=2, layout="zigzag")
    with pytest.raises(LayoutError, match="layout='spiral' is not known"):
        padded_len(4, world_size=2, layout="spiral")
    with pytest.raises(LayoutError, match="world_size=0"):
        padded_len(4, world_size=0, layout="zigzag")
    with pytest.raises(LayoutError, match="seq_len=9 does not lie within the 8 tokens"):
        unpad(torch.zeros(1, 8), seq_len=9)
    with pytest.raises(LayoutError, match=r"\[0, 4\] must end at seq_len=5"):
        pad_cu_seqlens(
            torch.tensor([0, 4], dtype=torch.int32), seq_len=5, world_size=2, layout="zigzag"
        )
