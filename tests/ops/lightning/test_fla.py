"""flash-linear-attention: its reference agrees with ours, and its kernels get what they expect."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.ops import lightning_attention
from ringctx.ops.lightning.fla import attend_with, lightning_by_fla
from tests.ops.lightning.cases import DOCUMENTS, Case, assert_exact, results
from tests.tolerances import assert_matches


# It warns of having no GPU.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reference", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
def test_its_reference_gives_our_numbers_in_our_convention(reference: str) -> None:
    from fla.ops.simple_gla import naive

    # It computes in fp32 whatever it is given.
    case = Case(batch=2, dtype=torch.float32, strongest=0.3)
    theirs = getattr(naive, reference)

    def attend(**given: Any) -> tuple[Tensor, Tensor]:
        out, state = theirs(
            given["q"],
            given["k"],
            given["v"],
            given["log_decay"],
            initial_state=given["initial_state"],
            output_final_state=True,
        )
        return out, state

    expected = results(attend, case)
    found = results(lightning_attention, case)  # type: ignore[arg-type]
    assert_exact(found, case)
    for name, x in found.items():
        assert_matches(name, x, expected[name].double(), flash=x)


def _kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    output_final_state: bool,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`chunk_simple_gla` by its documentation, without its speed."""
    assert output_final_state
    assert (g is None) != (g_gamma is None)
    log_decay = g if g_gamma is None else g_gamma.detach()
    bounds = None
    if cu_seqlens is not None and cu_seqlens_cpu is not None:
        assert torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
        # NaN there, so never here.
        assert (cu_seqlens_cpu.diff() > 0).all()
        bounds = cu_seqlens_cpu.int()
    out, state = lightning_attention(
        q,
        k,
        v,
        log_decay=log_decay,  # type: ignore[arg-type]
        initial_state=initial_state,
        cu_seqlens=bounds,
        scale=scale,
    )
    assert state is not None
    return out, state


@pytest.mark.parametrize("documents", [None, *DOCUMENTS[::5], DOCUMENTS[18]], ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["per head", "per token"])
def test_arguments_are_arranged_so_that_results_are_ours(
    documents: tuple[int, ...] | None, per_token: bool
) -> None:
    case = Case(documents=documents, per_token=per_token, dtype=torch.float32)

    def attend(**given: Any) -> tuple[Tensor, Tensor]:
        bounds = given.pop("cu_seqlens")
        q, k, v = (given.pop(name) for name in "qkv")
        return attend_with(
            _kernels,
            *(q, k, v),
            bounds=None if bounds is None else bounds.tolist(),
            scale=case.key_dim**-0.5,
            **given,
        )

    assert_exact(results(attend, case), case)


def test_refuses_what_its_kernels_cannot_take_or_would_round() -> None:
    rows = torch.zeros(1, 4, 2, 8)
    with pytest.raises(LayoutError, match=r"CUDA devices only, .* choose backend='torch'"):
        lightning_by_fla(
            rows,
            rows,
            rows,
            log_decay=torch.zeros(2),
            initial_state=None,
            cu_seqlens=None,
            scale=None,
        )


@pytest.mark.gpu
@pytest.mark.proves("lightning attention: flash-linear-attention as backend", on="GPU")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("documents", [None, *DOCUMENTS[::5]], ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["per head", "per token"])
def test_its_kernels_give_our_numbers(documents: tuple[int, ...] | None, per_token: bool) -> None:
    case = Case(
        documents=documents,
        per_token=per_token,
        dtype=torch.bfloat16,
        key_dim=64,
        value_dim=64,
        strongest=0.3,
    )
    inputs = {name: x.detach().cuda().requires_grad_() for name, x in case.inputs().items()}
    found = results(lightning_attention, case, inputs, backend="fla")  # type: ignore[arg-type]
    expected = results(lightning_attention, case)  # type: ignore[arg-type]
    for name, x in found.items():
        error = (x.cpu().double() - expected[name].double()).abs().max()
        assert error <= 0.02 * expected[name].double().abs().max(), name
