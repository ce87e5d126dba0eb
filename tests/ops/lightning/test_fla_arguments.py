"""What is kept from flash-linear-attention, and that it takes every argument that it is given."""

import inspect
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ringctx.errors import LayoutError
from ringctx.ops.lightning import fla
from ringctx.ops.lightning.fla import attend_with, lightning_by_fla


def _on_cuda(*, dtype: torch.dtype, key_dim: int = 8, value_dim: int = 8) -> tuple[Tensor, ...]:
    """Tensors that say that they are on a GPU."""
    with FakeTensorMode():
        shapes = [(1, 4, 2, dim) for dim in (key_dim, key_dim, value_dim)]
        return tuple(torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return lightning_by_fla(
        q, k, v, log_decay=torch.zeros(2), initial_state=None, cu_seqlens=None, scale=None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_inputs_are_refused_because_they_would_be_rounded(dtype: torch.dtype) -> None:
    with pytest.raises(LayoutError, match=f"TF32, and never wider, but q is {dtype}; convert"):
        _attend(*_on_cuda(dtype=dtype))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(7, 8), (8, 5)])
def test_odd_head_dims_are_refused_before_backward_would_fail(key_dim: int, value_dim: int) -> None:
    with pytest.raises(LayoutError, match=f"even head dims, but K={key_dim} and V={value_dim}"):
        _attend(*_on_cuda(dtype=torch.bfloat16, key_dim=key_dim, value_dim=value_dim))


def test_a_missing_library_is_told_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fla._kernels.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(LayoutError, match=r"cannot be imported .* pip install 'ringctx\[fla\]'"):
        _attend(*_on_cuda(dtype=torch.bfloat16))
    fla._kernels.cache_clear()


def test_the_library_takes_every_argument_that_it_is_given() -> None:
    given: dict[str, object] = {}

    def kernels(q: Tensor, k: Tensor, v: Tensor, **arguments: object) -> tuple[Tensor, Tensor]:
        given.update(arguments)
        return v, torch.zeros(2, 2, 8, 8)

    rows = torch.zeros(1, 4, 2, 8)
    for log_decay in (torch.zeros(2), torch.zeros(2, requires_grad=True), torch.zeros(1, 4, 2)):
        attend_with(
            kernels,
            rows,
            rows,
            rows,
            log_decay=log_decay,
            initial_state=torch.zeros(3, 2, 8, 8),
            bounds=[0, 1, 1, 4],
            scale=1.0,
        )
    # A head's decay of its own has no gradient there.
    assert {"g", "g_gamma", "initial_state", "cu_seqlens", "scale"} < set(given)
    taken = inspect.signature(fla._kernels()).parameters
    named = {name for name, x in taken.items() if x.kind != inspect.Parameter.VAR_KEYWORD}
    assert set(given) <= named
    assert list(taken)[:3] == ["q", "k", "v"]


def test_a_decay_per_head_is_given_by_token_only_where_it_needs_a_gradient() -> None:
    seen: list[set[str]] = []

    def kernels(q: Tensor, k: Tensor, v: Tensor, **arguments: object) -> tuple[Tensor, Tensor]:
        seen.append({"g", "g_gamma"} & set(arguments))
        return v, torch.zeros(1, 2, 8, 8)

    rows = torch.zeros(1, 4, 2, 8)

    def attend(log_decay: Tensor) -> None:
        attend_with(
            kernels, *(rows, rows, rows), log_decay=log_decay, initial_state=None, bounds=None,
            scale=1.0,
        )  # fmt: skip

    attend(torch.zeros(2))
    attend(torch.zeros(2, requires_grad=True))
    with torch.no_grad():
        attend(torch.zeros(2, requires_grad=True))
    attend(torch.zeros(1, 4, 2))
    assert seen == [{"g_gamma"}, {"g"}, {"g_gamma"}, {"g"}]
