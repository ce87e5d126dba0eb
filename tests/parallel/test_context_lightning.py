"""Lightning attention over ranks: exact in both passes, wherever documents begin and end."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ringctx.config import TopologyConfig
from ringctx.ops.lightning import lightning_attention, streamed
from ringctx.parallel.comm import LocalGroup, SoloGroup, record_traffic
from ringctx.parallel.context_lightning import context_lightning
from ringctx.parallel.state_exchange import StateExchange, UnderWay
from tests.parallel.lightning_cases import (
    DOCUMENTS,
    LightningCase,
    LightningResult,
    assert_matches_oracle,
    differentiate_on_rank,
    joined,
)
from tests.tolerances import assert_close
from tests.virtual_ranks import run_virtual

LAYOUTS = ("contiguous", "zigzag")
EXCHANGES = ("all_gather", "ring")
# More than a chunk in a part where there are few.
TOKENS = {2: 40, 3: 38, 4: 36, 8: 12}
# Both forms of decay for every layout of documents, and for every exchange.
EXACT = [
    LightningCase(
        world_size=world_size,
        tokens=TOKENS[world_size],
        layout=layout,
        exchange=EXCHANGES[exchange],
        documents=DOCUMENTS[documents],
        data_decay=(documents + exchange) % 2 == 1,
    )
    for world_size, layout, exchange, documents in itertools.product(
        TOKENS, LAYOUTS, range(2), range(len(DOCUMENTS))
    )
] + [
    LightningCase(world_size=1, tokens=40, documents=documents, data_decay=data_decay)
    for documents, data_decay in itertools.product(DOCUMENTS, (False, True))
]
ROUNDED = [
    replace(case, dtype=torch.float32, batch=1 + i % 2, heads=(1, 5)[i // 2 % 2], value_dim=9)
    for i, case in enumerate(EXACT[::3])
]


def _everywhere(case: LightningCase) -> list[LightningResult]:
    return run_virtual(case.world_size, lambda group: differentiate_on_rank(group, case))


@pytest.mark.proves("lightning attention over ranks, forward and backward", on="CPU")
@pytest.mark.parametrize("case", EXACT + ROUNDED, ids=str)
def test_equals_the_float64_recurrence(case: LightningCase) -> None:
    assert_matches_oracle(case, _everywhere(case))


@pytest.mark.proves("lightning attention: the same on any number of ranks", on="CPU")
@pytest.mark.parametrize("data_decay", [False, True])
@pytest.mark.parametrize("documents", ["one", "of_seven"])
def test_results_depend_on_neither_world_size_nor_chunk_length(
    documents: str, data_decay: bool
) -> None:
    whole = LightningCase(world_size=1, tokens=96, data_decay=data_decay)
    # Documents are those of the length alone.
    whole = replace(whole, documents=documents)
    (alone,) = _everywhere(whole)
    for world_size, chunk_len, layout in itertools.product((2, 4, 8), (16, 64, None), LAYOUTS):
        case = replace(
            whole,
            world_size=world_size,
            tokens=96 // world_size,
            chunk_len=chunk_len,
            layout=layout,
        )
        found = joined(case, _everywhere(case))
        for name, expected in vars(alone).items():
            assert_close(getattr(found, name), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_exchanges_give_the_same_bits_and_so_do_two_runs(layout: str) -> None:
    case = LightningCase(world_size=4, layout=layout, documents="random_1", data_decay=True)
    first = _everywhere(case)
    for other in (_everywhere(case), _everywhere(replace(case, exchange="ring"))):
        for a, b in zip(first, other, strict=True):
            pairs = zip(vars(a).values(), vars(b).values(), strict=True)
            assert all(torch.equal(x, y) for x, y in pairs)


@dataclass(frozen=True, kw_only=True)
class _Changed(LightningCase):
    """One whose tokens from `since` on are others."""

    since: int

    def whole_inputs(self) -> dict[str, Tensor]:
        inputs = super().whole_inputs()
        for name in ("q", "k", "v", "log_decay"):
            inputs[name][:, self.since :] *= 1.5
        return inputs


@pytest.mark.proves("lightning attention over ranks: no token sees a later one", on="CPU")
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_token_changes_no_bit_of_earlier_outputs(layout: str, exchange: str) -> None:
    case = LightningCase(world_size=3, tokens=20, layout=layout, exchange=exchange, data_decay=True)
    before = joined(case, _everywhere(case)).out
    for since in (1, 9, 10, 11, 20, 33, 50, 59):
        changed = _Changed(**vars(case), since=since)
        after = joined(case, _everywhere(changed)).out
        assert torch.equal(after[:, :since], before[:, :since])
        assert (after[:, since] - before[:, since]).abs().max() > 1e-3


@pytest.mark.parametrize("data_decay", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, "striped"])
def test_one_rank_is_bit_equal_to_the_plain_op_and_sends_nothing(
    layout: str, data_decay: bool
) -> None:
    case = LightningCase(
        world_size=1, tokens=50, batch=1, layout=layout, documents="of_seven", data_decay=data_decay
    )
    inputs = case.whole_inputs()
    grad_out = inputs.pop("grad_out")
    for x in inputs.values():
        x.requires_grad_()
    with record_traffic() as ledger:
        ours = differentiate_on_rank(SoloGroup(), case)
    assert ledger.moved_bytes == 0
    out, _ = lightning_attention(
        *(inputs[name] for name in "qkv"),
        log_decay=inputs["log_decay"],
        cu_seqlens=case.cu_seqlens,
        chunk_len=case.chunk_len,
        return_state=False,
    )
    plain = (out, *torch.autograd.grad(out, list(inputs.values()), grad_out))
    assert all(torch.equal(a, b) for a, b in zip(vars(ours).values(), plain, strict=True))


def _differing_ways(case: LightningCase, attend: Callable[..., Tensor]) -> None:
    """`attend(group, **inputs)` gives what the case does."""

    def body(group: LocalGroup) -> LightningResult:
        inputs = {n: case.local(n, x, group.rank()) for n, x in case.whole_inputs().items()}
        grad_out = inputs.pop("grad_out")
        for x in inputs.values():
            x.requires_grad_()
        out = attend(group, **inputs)
        return LightningResult(out, *torch.autograd.grad(out, list(inputs.values()), grad_out))

    assert_matches_oracle(case, run_virtual(case.world_size, body))


@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
def test_recomputation_gives_the_same_gradients(exchange: str) -> None:
    case = LightningCase(world_size=3, documents="random_0")

    def attend(group: LocalGroup, **inputs: Tensor) -> Tensor:
        def block(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
            return context_lightning(
                *(q, k, v),
                log_decay=log_decay,
                group=group,
                exchange=exchange,
                cu_seqlens=case.cu_seqlens,
            )

        out = checkpoint(block, *inputs.values(), use_reentrant=False)
        assert isinstance(out, Tensor)
        return out

    _differing_ways(case, attend)


def test_takes_any_strides_scale_topology_and_autocast() -> None:
    case = LightningCase(world_size=4, dtype=torch.float32, scale=-0.7)
    topology = TopologyConfig(kind="cables", link_gbit=1e-3)

    def attend(group: LocalGroup, *, log_decay: Tensor, **qkv: Tensor) -> Tensor:
        turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in qkv.values()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return context_lightning(
                *turned, log_decay=log_decay, group=group, scale=-0.7, topology=topology
            )

    _differing_ways(case, attend)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(dtype: torch.dtype, exchange: str) -> None:
    # The gradient of a decay per head would be rounded on each rank.
    case = LightningCase(world_size=4, tokens=16, dtype=dtype, exchange=exchange, data_decay=True)
    assert_matches_oracle(case, _everywhere(case))


def test_ranks_may_need_different_gradients_and_backward_may_come_twice() -> None:
    case = LightningCase(world_size=3, exchange="ring")
    whole = _everywhere(case)

    def body(group: LocalGroup) -> None:
        rank = group.rank()
        inputs = {n: case.local(n, x, rank) for n, x in case.whole_inputs().items()}
        grad_out = inputs.pop("grad_out")
        (name, needed) = list(inputs.items())[rank]
        needed.requires_grad_()
        out = context_lightning(**inputs, group=group, **case.settings)  # type: ignore[arg-type]
        for keep in (True, False):
            (grad,) = torch.autograd.grad(out, needed, grad_out, retain_graph=keep)
            assert torch.equal(grad, getattr(whole[rank], name))

    run_virtual(3, body)


def test_backward_outside_the_block_counts_into_the_ledger_of_its_forward() -> None:
    case = LightningCase(world_size=2)

    def body(group: LocalGroup) -> tuple[int, int]:
        inputs = {n: case.local(n, x, group.rank()) for n, x in case.whole_inputs().items()}
        grad_out = inputs.pop("grad_out")
        inputs["q"].requires_grad_()
        with record_traffic() as ledger:
            out = context_lightning(**inputs, group=group, **case.settings)  # type: ignore[arg-type]
        forward = ledger.moved_bytes
        out.backward(grad_out)
        return forward, ledger.moved_bytes - forward

    state = 8 * case.batch * case.heads * case.key_dim * case.value_dim
    assert run_virtual(2, body) == [(state, state), (2 * state, 2 * state)]


def test_there_is_one_exchange_a_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    start = StateExchange.start

    def noted(self: StateExchange, *args: Any, backward: bool) -> UnderWay:
        started.append(backward)
        return start(self, *args, backward=backward)

    monkeypatch.setattr(StateExchange, "start", noted)
    _everywhere(LightningCase(world_size=2))
    # On each rank.
    assert sorted(started) == [False, False, True, True]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("documents", ["one", "random_2"])
def test_it_does_not_matter_when_states_arrive(
    documents: str, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A chunk or two a group: some are done before the states are there, and some after.
    monkeypatch.setitem(streamed._GROUP_BYTES, "cpu", 16 * 2 * 3 * 16 * 8)
    case = LightningCase(
        world_size=2, tokens=120, documents=documents, exchange=exchange, data_decay=True
    )
    first, *others = (_with_patience(case, times, monkeypatch) for times in (0, 1, 3, 1000))
    assert_matches_oracle(case, first)
    for other in others:
        for a, b in zip(first, other, strict=True):
            pairs = zip(vars(a).values(), vars(b).values(), strict=True)
            assert all(torch.equal(x, y) for x, y in pairs)


def _with_patience(
    case: LightningCase, times: int, monkeypatch: pytest.MonkeyPatch
) -> list[LightningResult]:
    """Run as if no exchange were ready the first `times` times that it is asked."""
    asked: Counter[UnderWay] = Counter()

    def ready(self: UnderWay) -> bool:
        asked[self] += 1
        return asked[self] > times

    monkeypatch.setattr(UnderWay, "ready", ready)
    return _everywhere(case)
