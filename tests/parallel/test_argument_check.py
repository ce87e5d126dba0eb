"""Debug mode: calls that differ between ranks end in one error on all of them, with no hang."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringctx.errors import LayoutError
from ringctx.parallel.argument_check import agreed_arguments, is_checking
from ringctx.parallel.comm import Group, LocalGroup, SoloGroup, group_rank, record_traffic
from ringctx.parallel.context_attention import context_attention
from ringctx.parallel.mesh import context_mesh
from ringctx.parallel.ulysses import ulysses_attention
from tests.ranks import run_ranks
from tests.virtual_ranks import run_virtual


@pytest.fixture(autouse=True)
def debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGCTX_CHECK", "1")


def _message(call: Callable[[], object]) -> str:
    with pytest.raises(LayoutError) as caught:
        call()
    assert caught.value.on_all_ranks
    return str(caught.value)


def _call(group: Group, **arguments: Any) -> str:
    def call() -> None:
        with agreed_arguments(group, **arguments):
            pass

    return _message(call)


# What rank 2 of 3 passes where the others pass the first, and what all are told.
DIFFERENCES = [
    ("zigzag", "striped", "setting: ranks 0, 1 have zigzag; rank 2 has striped"),
    (None, 4, "setting: ranks 0, 1 have None; rank 2 has 4"),
    (
        torch.zeros(1, 4, 2, 8),
        torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16),
        r"setting: ranks 0, 1 have float32 [1, 4, 2, 8]; rank 2 has bfloat16 [1, 4, 2, 8]",
    ),
    (
        torch.tensor([0, 3, 9], dtype=torch.int32),
        torch.tensor([0, 4, 9], dtype=torch.int32),
        "setting: ranks 0, 1 have int32 [3] [0, 3, 9]; rank 2 has int32 [3] [0, 4, 9]",
    ),
]


@pytest.mark.parametrize(
    ("value", "other", "message"), DIFFERENCES, ids=["layout", "window", "dtype", "documents"]
)
def test_names_the_setting_the_ranks_and_the_values(value: Any, other: Any, message: str) -> None:
    def body(group: LocalGroup) -> str:
        return _call(group, same=1, setting=other if group.rank() == 2 else value)

    told = run_virtual(3, body)
    assert told == [f"the ranks do not make the same call:\n{message}"] * 3


def test_long_values_are_told_apart_by_a_digest() -> None:
    documents = torch.arange(0, 5000, 2, dtype=torch.int32)

    def body(group: LocalGroup) -> str:
        mine = documents.clone()
        mine[2000] += group.rank()
        return _call(group, cu_seqlens=mine)

    first, second = run_virtual(2, body)
    assert first == second
    assert first.count("sha256") == 2


def test_strides_and_gradients_may_differ() -> None:
    def body(group: LocalGroup) -> bool:
        x = torch.randn(2, 6, 4)
        if group.rank():
            x = x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
        with agreed_arguments(group, x=x, scale=None):
            return True

    assert all(run_virtual(4, body))


def test_a_rank_whose_own_checks_fail_tells_the_others() -> None:
    def body(group: LocalGroup) -> str:
        def call() -> None:
            with agreed_arguments(group, layout="zigzag"):
                if group.rank() == 1:
                    raise LayoutError("window=0 must be at least 1")

        return _message(call)

    expected = "the ranks do not make the same call:\nrank 1: window=0 must be at least 1"
    assert run_virtual(3, body) == [expected] * 3


def test_what_fails_on_all_ranks_alike_is_raised_as_it_is() -> None:
    def body(group: LocalGroup) -> str:
        def call() -> None:
            with agreed_arguments(group, layout="spiral"):
                raise LayoutError("layout='spiral' is not known")

        return _message(call)

    assert run_virtual(3, body) == ["layout='spiral' is not known"] * 3


def test_other_errors_of_a_rank_keep_their_type_when_all_have_them() -> None:
    def body(group: LocalGroup) -> None:
        with pytest.raises(TypeError, match="no number"), agreed_arguments(group):
            raise TypeError("no number")

    run_virtual(2, body)


def test_nothing_is_sent_outside_debug_mode_nor_counted_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def body(group: LocalGroup) -> None:
        with record_traffic() as ledger, agreed_arguments(group, a=1):
            pass
        assert not ledger.moved_bytes

    run_virtual(2, body)
    monkeypatch.setenv("RINGCTX_CHECK", "0")
    assert not is_checking()

    class Mute(SoloGroup):
        def size(self) -> int:
            return 2

        def start(self, sends: Any, recvs: Any) -> Any:
            raise AssertionError("a transfer started")

    with agreed_arguments(Mute(), a=1):
        pass
    with pytest.raises(LayoutError, match="mine"), agreed_arguments(Mute(), a=1):
        raise LayoutError("mine")


def _inputs(**changes: Any) -> dict[str, Any]:
    return {name: torch.zeros(1, 4, 4, 8) for name in "qkv"} | changes


# What rank 1 passes otherwise, and what both ranks are told.
WRONG_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"layout": "contiguous"}, "layout: rank 0 has zigzag; rank 1 has contiguous"),
    ({"window": 3}, "window: rank 0 has None; rank 1 has 3"),
    ({"scale": 0.5}, "scale: rank 0 has None; rank 1 has 0.5"),
    ({"q": torch.zeros(2, 4, 4, 8)}, "rank 1: q, k and v must share batch"),
    (_inputs(**{name: torch.zeros(1, 6, 4, 8) for name in "qkv"}), "q: rank 0 has float32 [1, 4,"),
    ({name: torch.zeros(1, 4, 2, 8) for name in "kv"}, "k: rank 0 has float32 [1, 4, 4, 8]"),
    ({"v": torch.zeros(1, 4, 2, 8)}, "rank 1: k and v must have one shape"),
    (_inputs(**{name: torch.zeros(1, 4, 4, 8).double() for name in "qkv"}), "rank 1 has float64"),
]


def _call_wrongly(group: Group, changes: dict[str, Any], *, lazily: bool = False) -> str:
    inputs = _inputs() | (changes if group_rank(group) else {})
    if lazily:
        inputs |= {name: lambda x=inputs[name]: x for name in "qkv"}
    return _message(lambda: ulysses_attention(group=group, **inputs))


@pytest.mark.parametrize("lazily", [False, True], ids=["tensors", "functions"])
@pytest.mark.parametrize(("changes", "message"), WRONG_CALLS, ids=[m for _, m in WRONG_CALLS])
def test_ulysses_ranks_that_differ_all_raise(
    changes: dict[str, Any], message: str, lazily: bool
) -> None:
    told = run_virtual(2, lambda group: _call_wrongly(group, changes, lazily=lazily))
    assert told[0] == told[1]
    # One after the other, a shape that is wrong beside the next is first one that differs.
    assert message in told[0] or (lazily and "q: rank 0 has" in told[0])


def _call_wrongly_over_gloo() -> list[str]:
    # In a rank's process: the variable is this process's own, and goes with it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RINGCTX_CHECK", "1")
        group = dist.group.WORLD
        assert group is not None
        told = [_call_wrongly(group, changes) for changes, _ in WRONG_CALLS]
        # The ranks are still in step.
        ulysses_attention(group=group, **_inputs())
        return told


def test_ranks_that_differ_all_raise_over_gloo() -> None:
    first, second = run_ranks(2, _call_wrongly_over_gloo)
    assert first == second
    for told, (_, message) in zip(first, WRONG_CALLS, strict=True):
        assert message in told


def test_ranks_of_a_mesh_that_differ_all_raise() -> None:
    def body(group: LocalGroup) -> str:
        mesh = context_mesh(group, ulysses_degree=2)
        schedule: Any = "one_way" if group.rank() == 3 else "auto"
        return _message(lambda: context_attention(mesh=mesh, schedule=schedule, **_inputs()))

    told = run_virtual(4, body)
    assert len(set(told)) == 1
    assert "schedule: ranks 0, 1, 2 have auto; rank 3 has one_way" in told[0]
