"""What lightning attention refuses, and the words of each refusal; who computes what."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.ops import lightning_attention, lightning_step

NAN = float("nan")


def _inputs(**changed: object) -> dict[str, Any]:
    """A call that works, with some arguments replaced."""
    rows = torch.randn(2, 6, 3, 4)
    inputs: dict[str, Any] = {"q": rows, "k": rows, "v": rows, "log_decay": -torch.rand(3)}
    return inputs | changed


def _packed(*bounds: int, **changed: object) -> dict[str, Any]:
    rows = torch.randn(1, 6, 3, 4)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return _inputs(q=rows, k=rows, v=rows, cu_seqlens=cu_seqlens) | changed


def _per_token(value: float) -> Tensor:
    log_decay = -torch.rand(2, 6, 3)
    log_decay[1, 4, 2] = value
    return log_decay


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (_inputs(log_decay=torch.tensor([-1.0, 0.5, 0.0])), r"positive .* the first is 0.5"),
        (_inputs(log_decay=torch.tensor([-1.0, NAN, 0.0])), r"not finite, the first is nan"),
        (_inputs(log_decay=_per_token(NAN)), r"1 of 36 entries .* the first is nan"),
        (_inputs(log_decay=_per_token(1e-3)), r"1 of 36 entries .* the first is 0.001"),
        (_inputs(log_decay=_per_token(-torch.inf)), r"-inf; .* -1e4 forgets everything"),
        (_inputs(log_decay=-torch.rand(2)), r"log_decay is \[2\]; .*\[H\] = \[3\]"),
        (_inputs(log_decay=torch.zeros(3, dtype=torch.int64)), "must be floating point"),
        (_inputs(initial_state=torch.zeros(2, 3, 4, 5)), r"\[B, H, K, V\] = \[2, 3, 4, 4\]"),
        (_inputs(initial_state=torch.zeros(2, 3, 4, 4).bfloat16()), "must be torch.float32"),
        (_inputs(initial_state=torch.zeros(2, 3, 4, 4).double()), "must be torch.float32"),
        (_inputs(initial_state=0), r"the state is 0; it must be a tensor, \[B, H,"),
        (_packed(0, 6, initial_state=torch.zeros(2, 3, 4, 4)), r"\[documents, H, K, V\] = \[1,"),
        (_packed(0, 4, 2, 6), "falls from 4 to 2 at document 1"),
        (_packed(0, 5), "goes from 0 to 5; it must go from 0 to the number of tokens, 6"),
        (_packed(1, 6), "goes from 1 to 6"),
        (_packed(0, 6, cu_seqlens=torch.tensor([0, 6])), "must be int32"),
        (_inputs(cu_seqlens=torch.tensor([0, 6], dtype=torch.int32)), "q has 2; join the rows"),
        (_inputs(k=torch.randn(2, 6, 1, 4)), "every head has keys and values of its own"),
        (_inputs(v=torch.randn(2, 6, 3, 4).double()), "must share one of"),
        (_inputs(k=None), r"k=None must be a tensor, \[B, T, H, D\]"),
        (_inputs(log_decay=torch.tensor([-1.0, 0.2, 0.0])), r"the first is 0.2;"),
        (_inputs(q=torch.randn(2, 6, 12)), r"must be \[B, T, H, D\]"),
        (_inputs(chunk_len=48), "chunk_len=48 must be one of 16, 32, 64, 128"),
        (_inputs(scale=NAN), "scale=nan must be a finite number"),
        (_inputs(backend="cuda"), "'cuda' is not known; choose one of torch, triton, fla"),
        (_inputs(backend="triton"), r"CUDA devices only, but q is on cpu; choose backend='torch'"),
        (_inputs(backend="fla"), r"CUDA devices only, but q is on cpu"),
    ],
)
def test_refuses(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        lightning_attention(**inputs)


def test_a_step_refuses_what_the_whole_does() -> None:
    token = torch.randn(2, 3, 4)
    inputs: dict[str, Any] = {"q": token, "k": token, "v": token, "state": torch.zeros(2, 3, 4, 4)}
    with pytest.raises(LayoutError, match="positive or not finite"):
        lightning_step(**inputs, log_decay=torch.ones(3))
    with pytest.raises(LayoutError, match=r"must be \[B, H, K, V\]"):
        lightning_step(**inputs | {"state": torch.zeros(3, 4, 4)}, log_decay=-torch.ones(3))
    with pytest.raises(LayoutError, match=r"one token must be \[B, H, D\]"):
        lightning_step(**inputs | {"q": token[0]}, log_decay=-torch.ones(3))
    with pytest.raises(LayoutError, match=r"k of one token must be \[B, H, D\], not None"):
        lightning_step(**inputs | {"k": None}, log_decay=-torch.ones(3))


def test_nan_is_not_hidden_and_stays_in_its_document() -> None:
    for name in "qkv":
        inputs = _packed(0, 3, 6)
        inputs[name] = inputs[name].clone()
        inputs[name][0, 3, 1] = NAN
        out, state = lightning_attention(**inputs)
        assert state is not None
        assert out[0, 3, 1].isnan().any()
        assert not out[0, :3].isnan().any()
        assert not state[0].isnan().any()
        if name != "q":
            assert state[1, 1].isnan().any()
