"""The two oracles of linear attention: against each other, and against sums done by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ringctx.ops.naive_lightning import naive_quadratic, naive_recurrent

ORACLES = [naive_recurrent, naive_quadratic]
Oracle = Callable[..., tuple[Tensor, Tensor]]

# Of 13 tokens a row: one document, empty ones first, last and between, and some of one token.
LAYOUTS = [
    None,
    (0, 13),
    (0, 5, 13),
    (0, 0, 5, 5, 5, 13, 13),
    (0, 1, 2, 3, 13),
    tuple(range(14)),
]


def _inputs(
    *, batch: int = 2, tokens: int = 13, documents: int = 1, per_token: bool
) -> dict[str, Tensor]:
    shapes = {
        "q": (batch, tokens, 3, 4),
        "k": (batch, tokens, 3, 4),
        "v": (batch, tokens, 3, 5),
        "log_decay": (batch, tokens, 3) if per_token else (3,),
        "initial_state": (batch * documents, 3, 4, 5),
    }
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    inputs["log_decay"] = -inputs["log_decay"].abs()
    return {name: x.requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("cu_seqlens", LAYOUTS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_recurrence_and_the_dense_sum_agree(
    per_token: bool, cu_seqlens: tuple[int, ...] | None, scale: float | None
) -> None:
    inputs = _inputs(per_token=per_token, documents=len(cu_seqlens or (0, 13)) - 1)
    results = []
    grad_out = torch.randn(2, 13, 3, 5, dtype=torch.float64)
    grad_state = torch.randn(inputs["initial_state"].shape, dtype=torch.float64)
    for oracle in ORACLES:
        out, state = oracle(**inputs, cu_seqlens=cu_seqlens, scale=scale)
        loss = (out * grad_out).sum() + (state * grad_state).sum()
        results.append([out, state, *torch.autograd.grad(loss, list(inputs.values()))])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("oracle", ORACLES)
def test_two_tokens_are_what_the_definition_says(oracle: Oracle) -> None:
    q = torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1)
    k = torch.tensor([5.0, 7.0]).reshape(1, 2, 1, 1)
    v = torch.tensor([[1.0, 10.0], [2.0, 20.0]]).reshape(1, 2, 1, 2)
    half = math.log(0.5)
    out, state = oracle(
        q, k, v, log_decay=torch.tensor([half], dtype=torch.float64), scale=0.1,
        initial_state=torch.tensor([4.0, 6.0]).reshape(1, 1, 1, 2),
    )  # fmt: skip
    # 0.5 * (4, 6) + 5 * (1, 10), then 0.5 * (7, 53) + 7 * (2, 20)
    expected = torch.tensor([[7.0, 53.0], [17.5, 166.5]], dtype=torch.float64)
    torch.testing.assert_close(state[0, 0, 0], expected[1])
    torch.testing.assert_close(out[0, :, 0], 0.1 * torch.tensor([[2.0], [3.0]]).double() * expected)
    per_token = torch.tensor([-torch.inf, half], dtype=torch.float64).reshape(1, 2, 1)
    out, state = oracle(q, k, v, log_decay=per_token)
    # The first token forgets what was before it, not itself.
    expected = torch.tensor([[5.0, 50.0], [16.5, 165.0]], dtype=torch.float64)
    torch.testing.assert_close(state[0, 0, 0], expected[1])
    torch.testing.assert_close(out[0, :, 0], torch.tensor([[2.0], [3.0]]).double() * expected)


@pytest.mark.parametrize("oracle", ORACLES)
def test_documents_are_as_if_alone_and_empty_ones_pass_their_state_on(oracle: Oracle) -> None:
    bounds = (0, 0, 4, 4, 13)
    inputs = _inputs(batch=1, documents=4, per_token=True)
    initial = inputs.pop("initial_state")
    out, state = oracle(**inputs, initial_state=initial, cu_seqlens=torch.tensor(bounds))
    for document, (start, stop) in enumerate([(0, 0), (0, 4), (4, 4), (4, 13)]):
        alone, left = oracle(
            **{name: x[:, start:stop] for name, x in inputs.items()},
            initial_state=initial[document, None],
        )
        torch.testing.assert_close(out[:, start:stop], alone)
        torch.testing.assert_close(state[document, None], left)
    assert torch.equal(state[0], initial[0])
    assert torch.equal(state[2], initial[2])


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("per_token", [False, True])
def test_gradients_are_those_of_finite_differences(oracle: Oracle, per_token: bool) -> None:
    inputs = _inputs(batch=1, tokens=4, documents=2, per_token=per_token)

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors, strict=True))
        named["log_decay"] = -named["log_decay"].abs()
        return oracle(**named, cu_seqlens=(0, 1, 4))

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("oracle", ORACLES)
def test_infinite_decay_has_finite_gradients(oracle: Oracle) -> None:
    inputs = _inputs(per_token=True)
    with torch.no_grad():
        inputs["log_decay"][:, 6] = -torch.inf
    out, state = oracle(**inputs)
    grads = torch.autograd.grad(out.sum() + state.sum(), list(inputs.values()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("oracle", ORACLES)
def test_half_precision_inputs_are_taken_as_they_are_and_results_are_double(
    oracle: Oracle,
) -> None:
    inputs = {name: x.detach().bfloat16() for name, x in _inputs(per_token=False).items()}
    results = oracle(**inputs)
    expected = oracle(**{name: x.double() for name, x in inputs.items()})
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
