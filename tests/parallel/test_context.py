"""A module of one's own over ranks: equal to one process, forward and backward."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ringctx.config import TopologyConfig
from ringctx.errors import LayoutError
from ringctx.ops.naive import naive_attention
from ringctx.parallel.comm import Group, SoloGroup
from ringctx.parallel.context import ContextParallel, SharedSequence, next_tokens, scale_loss
from ringctx.parallel.layout import LAYOUTS
from tests.ranks import RankError, run_ranks
from tests.tolerances import assert_close

HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4, 2, 4, 13


@dataclass(frozen=True)
class Case:
    """One mask, over rows of one length."""

    name: str
    seq_len: int
    docs: tuple[int, ...] = ()
    causal: bool = True
    window: int | None = None
    sinks: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def cu_seqlens(self) -> Tensor | None:
        return torch.tensor([0, *self.docs]).cumsum(0).int() if self.docs else None

    @property
    def mask(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window, "sinks": self.sinks}


CASES = [
    Case("causal", 16),
    Case("causal-odd", 17),
    Case("one-token", 1),
    Case("full-odd", 13, causal=False),
    Case("window-and-sinks-odd", 23, window=4, sinks=2),
    Case("documents", 24, docs=(7, 1, 16)),
    Case("documents-odd", 21, docs=(9, 2, 10)),
    Case("documents-full-odd", 21, docs=(9, 2, 10), causal=False),
    Case("documents-window-sinks-odd", 27, docs=(14, 13), window=3, sinks=1),
]


class Model(nn.Module):
    """One attention layer between embeddings; positions are learned, so a wrong one shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        width = HEADS * HEAD_DIM
        self.embed = nn.Embedding(VOCAB, width)
        self.place = nn.Embedding(64, width)
        self.qkv = nn.Linear(width, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.head = nn.Linear(width, VOCAB)
        self.double()

    def forward(self, tokens: Tensor, case: Case, sequence: SharedSequence | None = None) -> Tensor:
        """Logits; without a sequence by the naive oracle."""
        places = torch.arange(tokens.shape[1]) if sequence is None else sequence.positions
        x = self.embed(tokens) + self.place(places)
        heads = self.qkv(x).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        if sequence is None:
            out, _ = naive_attention(q, k, v, cu_seqlens=case.cu_seqlens, **case.mask)
        else:
            out = sequence.attend(q, k, v, **case.mask)
        logits: Tensor = self.head(x + out.flatten(-2))
        return logits


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _batch(case: Case) -> tuple[Tensor, Tensor]:
    """Whole rows, and their targets; some have none."""
    tokens = torch.randint(VOCAB, (2, case.seq_len), generator=torch.Generator().manual_seed(4))
    targets = next_tokens(tokens, cu_seqlens=case.cu_seqlens)
    # A single token has no next; let it predict itself.
    targets[:, 0] = tokens[:, 0]
    return tokens, targets


def _loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def _compare(case: Case, layout: str) -> None:
    tokens, targets = _batch(case)
    num_targets = (targets != -100).sum()
    oracle = Model()
    expected_logits = oracle(tokens, case)
    expected = _loss_sum(expected_logits, targets) / num_targets
    expected.backward()

    model, context = Model(), ContextParallel(group=_world(), layout=layout)
    sequence = context.sequence(case.seq_len, cu_seqlens=case.cu_seqlens)
    logits = model(sequence.shard(tokens), case, sequence)
    loss_sum = _loss_sum(logits, sequence.shard(targets, pad=-100))
    loss = scale_loss(loss_sum, num_targets=num_targets)
    loss.backward()
    context.reduce_gradients(model)

    assert_close(context.sum(loss), expected.detach())
    assert_close(sequence.unshard(logits), expected_logits.detach(), scale=4)
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert_close(mine.grad, theirs.grad, scale=4)


@pytest.mark.proves("a module of one's own over ranks", on="CPU/gloo")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_logits_and_gradients_equal_the_oracle(case: Case, world_size: int) -> None:
    run_ranks(world_size, _compare, case, "zigzag")


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_other_layouts_equal_the_oracle(layout: str) -> None:
    run_ranks(3, _compare, CASES[-1], layout)


def _like_torch(seq_len: int, is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, heads, seq_len, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator).double() for shape in shapes)
    sequence = ContextParallel(group=_world()).sequence(seq_len)
    settings: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": True, "scale": 0.3}
    expected = F.scaled_dot_product_attention(q, k, v, **settings)
    q, k, v = (sequence.shard(x, dim=2) for x in (q, k, v))
    actual = sequence.scaled_dot_product_attention(q, k, v, **settings)
    assert_close(sequence.unshard(actual, dim=2), expected)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("seq_len", [8, 11])
def test_stands_in_for_scaled_dot_product_attention(seq_len: int, is_causal: bool) -> None:
    run_ranks(2, _like_torch, seq_len, is_causal)


def _differ(how: str) -> None:
    tokens = torch.arange(12).view(2, 6)
    given: dict[str, Tensor | None] = {"tokens": tokens, "labels": None}
    if dist.get_rank() == 1:
        match how:
            case "shape":
                given["tokens"] = tokens.view(1, 12)
            case "contents":
                given["tokens"] = tokens.clone().index_fill_(1, torch.tensor([3]), 50)
            case "order":
                given["tokens"] = tokens.flip(1)
            case "names":
                given["labels"] = tokens
            case "dtype":
                given["tokens"] = tokens.int()
            case "presence":
                given["tokens"] = None
            case "nothing":
                given["labels"] = None
    ContextParallel(group=_world()).check_same(**given)


@pytest.mark.parametrize("how", ["shape", "contents", "order", "names", "dtype", "presence"])
def test_ranks_that_hold_different_batches_are_told_so(how: str) -> None:
    with pytest.raises(RankError, match="differs between them"):
        run_ranks(2, _differ, how)


def test_ranks_that_hold_the_same_batch_go_on() -> None:
    run_ranks(2, _differ, "nothing")


def _compare_nothing() -> None:
    context = ContextParallel(group=_world())
    context.check_same()
    context.check_same(tokens=None)
    x = torch.tensor([0.0, 1.5, float("nan")], dtype=torch.bfloat16)
    context.check_same(x=x, flags=x > 1, width=torch.tensor(3))
    # Equal as numbers, and not the same.
    with pytest.raises(LayoutError, match=r"\(x\) differs"):
        context.check_same(x=torch.tensor([0.0 if dist.get_rank() else -0.0]))


def test_ranks_compare_nothing_and_anything() -> None:
    run_ranks(2, _compare_nothing)


def _alone(seq_len: int = 6, *, cu_seqlens: Tensor | None = None) -> SharedSequence:
    return ContextParallel(group=SoloGroup()).sequence(seq_len, cu_seqlens=cu_seqlens)


class OneOf(SoloGroup):
    """A rank of a larger group that sends nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seq_len", [1, 7, 12, 13])
def test_shards_cover_every_token_once_and_pad_the_rest(seq_len: int, layout: str) -> None:
    seen: dict[int, int] = {}
    for rank in range(3):
        group: Group = OneOf(rank, 3)
        sequence = ContextParallel(group=group, layout=layout).sequence(seq_len)
        local = sequence.shard(torch.arange(seq_len)[None], pad=-1)[0]
        assert len(local) == sequence.local_len == len(sequence.positions)
        for position, token in zip(sequence.positions.tolist(), local.tolist(), strict=True):
            assert position not in seen
            seen[position] = token
    assert seen == {i: i if i < seq_len else -1 for i in range(sequence.padded_len)}
    assert sequence.padded_len - seq_len < 6


def test_padding_is_a_document_of_its_own() -> None:
    context = ContextParallel(group=OneOf(0, 2))
    borders = torch.tensor([0, 3, 7], dtype=torch.int64)
    padded = context.sequence(7, cu_seqlens=borders).cu_seqlens
    assert padded is not None and padded.tolist() == [0, 3, 7, 8] and padded.dtype == torch.int32
    whole = context.sequence(8, cu_seqlens=torch.tensor([0, 3, 8])).cu_seqlens
    assert whole is not None and whole.tolist() == [0, 3, 8]


def test_next_tokens_stop_at_the_end_of_each_document() -> None:
    tokens = torch.arange(10, 17)[None]
    assert next_tokens(tokens).tolist() == [[11, 12, 13, 14, 15, 16, -100]]
    borders = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    assert next_tokens(tokens, cu_seqlens=borders).tolist() == [[11, 12, -100, -100, 15, 16, -100]]


def test_autocast_reaches_attention_as_it_does_torchs_own() -> None:
    q, k, v = (torch.randn(1, 6, 2, 4) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _alone().attend(q.bfloat16(), k, v).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, "attn_mask describes a whole"),
        ({"dropout_p": 0.1}, r"dropout_p=0\.1"),
        ({"enable_gqa": False}, "pass enable_gqa=True"),
    ],
)
def test_refuses_what_torchs_function_takes(settings: dict[str, Any], message: str) -> None:
    q, k = torch.randn(1, 4, 6, 4), torch.randn(1, 2, 6, 4)
    with pytest.raises(LayoutError, match=message):
        _alone().scaled_dot_product_attention(q, k, k, **{"enable_gqa": True} | settings)


def test_refuses_tensors_that_are_not_shards_of_the_sequence() -> None:
    sequence = ContextParallel(group=OneOf(0, 2)).sequence(8)
    with pytest.raises(LayoutError, match="9 tokens; this sequence has 8"):
        sequence.shard(torch.zeros(1, 9))
    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(LayoutError, match="this rank holds 4 of the sequence's 8 tokens"):
        sequence.attend(q, q, q)


@pytest.mark.parametrize("borders", [[0, 5], [1, 6], [0, 4, 4, 6], [0, 5, 4, 6], [0]])
def test_refuses_documents_that_do_not_fill_the_row(borders: list[int]) -> None:
    with pytest.raises(LayoutError, match="cu_seqlens"):
        _alone(6, cu_seqlens=torch.tensor(borders))


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([0, 6], "cu_seqlens is a list; pass an integer tensor"),
        (torch.tensor([0, 3.7, 6]), r"cu_seqlens is torch\.float32; it must hold integers"),
        (torch.tensor([False, True]), r"cu_seqlens is torch\.bool"),
        (torch.tensor([0, 2**32 + 3, 6]), "beyond int32"),
        (torch.tensor([[0, 6]]), "must be int32 .documents"),
    ],
)
def test_refuses_documents_that_are_no_integers(borders: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        _alone(6, cu_seqlens=borders)


def test_refuses_a_step_without_targets() -> None:
    with pytest.raises(LayoutError, match="no targets"):
        scale_loss(torch.zeros(()), num_targets=0)


def test_refuses_what_is_no_group_or_layout() -> None:
    with pytest.raises(LayoutError, match="group=None names no ranks"):
        ContextParallel(group=None)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="layout='spiral' is not known"):
        ContextParallel(group=SoloGroup(), layout="spiral")
    with pytest.raises(LayoutError, match="schedule='spiral' is not known; choose one of auto"):
        ContextParallel(group=SoloGroup(), schedule="spiral")
    with pytest.raises(LayoutError, match=r"such as TopologyConfig\(kind='cables'\)"):
        ContextParallel(group=SoloGroup(), topology="cables")  # type: ignore[arg-type]
    nodes = TopologyConfig(kind="two_level", ranks_per_node=2)
    with pytest.raises(LayoutError, match="ranks_per_node=2 does not spread the 3 ranks"):
        ContextParallel(group=OneOf(0, 3), topology=nodes)
    with pytest.raises(LayoutError, match="has no collectives"):
        ContextParallel(group=OneOf(0, 2)).sum(torch.zeros(1))
