"""What lightning attention over ranks refuses, before anything moves."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ringctx.config import TopologyConfig
from ringctx.errors import LayoutError
from ringctx.parallel.comm import LocalGroup, Pending, SoloGroup, Transfer
from ringctx.parallel.context_lightning import context_lightning
from tests.virtual_ranks import run_virtual


@pytest.fixture(autouse=True)
def no_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGCTX_CHECK", "0")


class _NobodyThere(LocalGroup):
    """The first of three ranks; it must not come to a transfer."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 3

    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        raise AssertionError("a transfer started")


def _call(**changes: Any) -> dict[str, Any]:
    inputs = {name: torch.zeros(2, 4, 3, 8) for name in "qkv"}
    return inputs | {"log_decay": -torch.ones(3), "group": _NobodyThere()} | changes


def _bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _decay(value: float) -> torch.Tensor:
    decay = -torch.ones(2, 4, 3)
    decay[1, 2, 0] = value
    return decay


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_call(group=None), "group=None names no ranks"),
        (_call(layout="striped"), "layout='striped' deals neighbouring tokens .* Use layout='zig"),
        (_call(layout="spiral"), "layout='spiral' is not known"),
        (_call(exchange="doubling"), "exchange='doubling' is not known; .* auto, all_gather, ring"),
        (_call(topology="switch"), "topology='switch' must be a ringctx.config.TopologyConfig"),
        (
            _call(topology=TopologyConfig(kind="two_level", ranks_per_node=2)),
            "ranks_per_node=2 does not spread the 3 ranks",
        ),
        (
            _call(log_decay=_decay(0.5)),
            "log_decay has 1 of 24 entries that are positive or not fin",
        ),
        (_call(log_decay=_decay(float("nan"))), "log_decay has 1 of 24 entries .* first is nan"),
        (_call(log_decay=_decay(-1.0)[..., :1]), r"log_decay is \[2, 4, 1\]; it must be \[H\]"),
        (_call(log_decay=-torch.ones(2, 12, 3)), r"log_decay is \[2, 12, 3\]; it must be \[H\]"),
        (_call(log_decay=torch.zeros(3, dtype=torch.int64)), "must be floating point"),
        (_call(log_decay=-0.5), "log_decay=-0.5 must be a tensor"),
        (_call(k=torch.zeros(2, 4, 1, 8)), r"q and k must be equal in all dims"),
        (_call(k=torch.zeros(2, 4, 3, 4)), r"q and k must be equal in all dims"),
        (_call(v=torch.zeros(2, 6, 3, 8)), r"v in the first three"),
        (_call(v=torch.zeros(2, 4, 3, 8, dtype=torch.float64)), "they must share one of"),
        (_call(q=torch.zeros(4, 3, 8)), r"must be \[B, T, H, D\]"),
        (
            _call(**{name: torch.zeros(2, 5, 3, 8) for name in "qkv"}),
            r"seq_len=15 is not divisible by 2 \* world_size = 6",
        ),
        (_call(chunk_len=48), "chunk_len=48 must be one of 16, 32, 64, 128"),
        (_call(scale=float("inf")), "scale=inf must be a finite number"),
        (_call(backend="cublas"), "backend='cublas'"),
        (_call(cu_seqlens=_bounds(0, 4)), "goes from 0 to 4; it must go from 0 to seq_len=12"),
        (_call(cu_seqlens=_bounds(2, 12)), "goes from 2 to 12; it must go from 0 to seq_len=12"),
        (_call(cu_seqlens=_bounds(0, 9, 5, 12)), r"cu_seqlens\[2\]=5 is below cu_seqlens\[1\]=9"),
        (_call(cu_seqlens=_bounds()), "cu_seqlens is empty"),
        (_call(cu_seqlens=torch.tensor([0, 12])), "must be int32"),
        (_call(cu_seqlens=[0, 12]), "cu_seqlens is a list"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_rejects_before_any_transfer(call: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        context_lightning(**call)


def test_one_rank_is_as_strict_but_for_layouts() -> None:
    solo = _call(group=SoloGroup(), layout="striped")
    context_lightning(**solo)
    for wrong in ({"exchange": "none"}, {"layout": "spiral"}, {"cu_seqlens": _bounds(0, 3)}):
        with pytest.raises(LayoutError):
            context_lightning(**solo | wrong)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("log_decay", (-torch.ones(3), -2 * torch.ones(3)), "log_decay: rank 0 has torch.float32"),
        ("log_decay", (-torch.ones(3), -torch.ones(2, 4, 3)), "log_decay: "),
        ("log_decay", (-torch.ones(3), torch.ones(3)), "rank 1: log_decay has 3 of 3 entries"),
        ("cu_seqlens", (None, _bounds(0, 3, 8)), "cu_seqlens: rank 0 has None"),
        ("scale", (None, 1.0), "scale: rank 0 has None; rank 1 has 1.0"),
        ("v", (torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8, requires_grad=True)), "differ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_debug_mode_tells_all_ranks_what_they_do_not_agree_on(
    name: str, values: tuple[object, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGCTX_CHECK", "1")

    def body(group: LocalGroup) -> str:
        with pytest.raises(LayoutError, match="do not make the same call") as raised:
            context_lightning(**_call(group=group) | {name: values[group.rank()]})
        return str(raised.value)

    first, second = run_virtual(2, body)
    assert first == second
    assert message in first
