"""The chunked cross entropy against torch's, in value and in both gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringctx.ops.losses import IGNORE_INDEX, linear_cross_entropy_sum
from tests.tolerances import assert_close


def _inputs(dtype: torch.dtype, *, tokens: int = 37, vocab: int = 19) -> tuple[Tensor, ...]:
    hidden = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 7, 37, 100, None])
def test_loss_and_gradients_equal_the_whole_logits(chunk: int | None) -> None:
    hidden, weight, targets = _inputs(torch.float64)
    loss = linear_cross_entropy_sum(hidden, weight, targets, chunk=chunk)
    got = torch.autograd.grad(loss * 0.25, (hidden, weight))
    reference = F.cross_entropy(
        hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORE_INDEX
    )
    expected = torch.autograd.grad(reference * 0.25, (hidden, weight))
    assert_close(loss, reference)
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])


def test_a_bf16_model_gets_an_fp32_loss() -> None:
    hidden, weight, targets = _inputs(torch.bfloat16)
    loss = linear_cross_entropy_sum(hidden, weight, targets, chunk=8)
    logits = F.linear(hidden, weight).float()
    reference = F.cross_entropy(logits, targets, reduction="sum")
    assert loss.dtype == torch.float32
    assert_close(loss, reference)
    loss.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_tokens_without_targets_give_no_loss_and_no_gradient() -> None:
    hidden, weight, targets = _inputs(torch.float32)
    targets.fill_(IGNORE_INDEX)
    loss = linear_cross_entropy_sum(hidden, weight, targets, chunk=8)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, weight, targets = _inputs(torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy_sum(hidden, weight, targets, chunk=8)
    assert not loss.requires_grad
