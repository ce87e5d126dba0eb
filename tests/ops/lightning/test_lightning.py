"""The op against its recurrence, forward and backward: lengths, documents, dtypes, decays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringctx.ops import lightning_attention
from ringctx.ops.lightning import streamed
from tests.ops.lightning.cases import DOCUMENTS, HALF, NAMES, Case, assert_exact, results

CHUNK_LENS = [16, 32, 64, 128, None]
TOKENS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 130, 200, 257]


def _op(case: Case, **given_settings: object) -> dict[str, torch.Tensor]:
    return results(lightning_attention, case, **given_settings)  # type: ignore[arg-type]


@pytest.mark.proves("lightning attention, forward and backward", on="CPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["per head", "per token"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_recurrence_at_any_length_and_chunk_length(
    tokens: int, per_token: bool, dtype: torch.dtype
) -> None:
    case = Case(tokens=tokens, batch=1 + tokens % 3, per_token=per_token, dtype=dtype)
    for chunk_len in CHUNK_LENS:
        assert_exact(_op(case, chunk_len=chunk_len), case)


@pytest.mark.proves("lightning attention, forward and backward", on="CPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["per head", "per token"])
@pytest.mark.parametrize("documents", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_equals_the_recurrence_for_packed_documents(
    documents: tuple[int, ...], per_token: bool, dtype: torch.dtype
) -> None:
    case = Case(documents=documents, per_token=per_token, dtype=dtype)
    for chunk_len in (16, 64, None):
        assert_exact(_op(case, chunk_len=chunk_len), case)


@pytest.mark.parametrize("documents", [None, DOCUMENTS[9], DOCUMENTS[13], DOCUMENTS[21]])
@pytest.mark.parametrize("per_token", [False, True], ids=["per head", "per token"])
@pytest.mark.parametrize("group_bytes", [1, 5_000, 20_000])
def test_the_size_of_groups_changes_no_result(
    documents: tuple[int, ...] | None,
    per_token: bool,
    group_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(documents=documents, per_token=per_token)
    monkeypatch.setitem(streamed._GROUP_BYTES, "cpu", group_bytes)
    for chunk_len in (16, 32):
        assert_exact(_op(case, chunk_len=chunk_len), case)


@pytest.mark.parametrize("per_token", [False, True], ids=["per head", "per token"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS[20]], ids=["one", "packed"])
def test_the_chunk_length_changes_results_by_rounding_only(
    documents: tuple[int, ...] | None, per_token: bool
) -> None:
    case = Case(documents=documents, per_token=per_token)
    whole = _op(case, chunk_len=128)
    for chunk_len in CHUNK_LENS:
        for name, found in _op(case, chunk_len=chunk_len).items():
            largest = whole[name].abs().max().item()
            torch.testing.assert_close(found, whole[name], rtol=0, atol=1e-12 * largest)


@settings(max_examples=40)
@given(
    case=st.builds(
        Case,
        tokens=st.integers(1, 70),
        batch=st.integers(1, 3),
        heads=st.integers(1, 5),
        key_dim=st.integers(1, 9),
        value_dim=st.integers(1, 9),
        per_token=st.booleans(),
        strongest=st.sampled_from([0.0, 0.01, 1.0, 10.0]),
    ),
    chunk_len=st.sampled_from(CHUNK_LENS),
    scale=st.none() | st.floats(0.1, 2.0),
)
def test_equals_the_recurrence_for_any_shape(
    case: Case, chunk_len: int | None, scale: float | None
) -> None:
    if scale is not None:
        # The oracle of a case has the scale of its queries.
        inputs = case.inputs()
        inputs["q"] = (inputs["q"].detach() * case.key_dim**-0.5 / scale).requires_grad_()
        found = results(
            lightning_attention,  # type: ignore[arg-type]
            case,
            inputs,
            chunk_len=chunk_len,
            scale=scale,
        )
        found["q"] = found["q"] * case.key_dim**-0.5 / scale
    else:
        found = _op(case, chunk_len=chunk_len)
    assert_exact(found, case)


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 75), max_size=12),
    per_token=st.booleans(),
    chunk_len=st.sampled_from(CHUNK_LENS),
)
def test_equals_the_recurrence_for_any_documents(
    cuts: list[int], per_token: bool, chunk_len: int | None
) -> None:
    case = Case(tokens=75, documents=(0, *sorted(cuts), 75), per_token=per_token)
    assert_exact(_op(case, chunk_len=chunk_len), case)


@pytest.mark.parametrize("strongest", [0.0, 1e-6, 50.0, 1e4, 1e38])
@pytest.mark.parametrize("per_token", [False, True], ids=["per head", "per token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_any_strength_of_decay_is_exact(
    strongest: float, per_token: bool, dtype: torch.dtype
) -> None:
    case = Case(strongest=strongest, per_token=per_token, dtype=dtype)
    for chunk_len in (16, None):
        assert_exact(_op(case, chunk_len=chunk_len), case)


@pytest.mark.parametrize("reset", [-50.0, -1e4, -1e30, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_token_that_forgets_all_blurs_none_of_the_decays_around_it(
    reset: float | None, dtype: torch.dtype
) -> None:
    lowest = torch.finfo(dtype).min
    case = Case(dtype=dtype, strongest=0.1, reset=lowest if reset is None else reset)
    for chunk_len in (16, None):
        assert_exact(_op(case, chunk_len=chunk_len), case)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["per head", "per token"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS[19]], ids=["one", "packed"])
def test_half_precision_is_rounded_once_and_states_are_fp32(
    documents: tuple[int, ...] | None, per_token: bool, dtype: torch.dtype
) -> None:
    case = Case(documents=documents, per_token=per_token, dtype=dtype, strongest=0.3)
    found = _op(case)
    assert {name: x.dtype for name, x in found.items()} == {
        "out": dtype,
        "state": torch.float32,
        **dict(zip(NAMES, [dtype] * 3 + [torch.float32] * 2, strict=True)),
    }
    assert_exact(found, case)


def test_decay_may_be_of_any_floating_dtype() -> None:
    case = Case(dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        inputs = case.inputs()
        inputs["log_decay"] = inputs["log_decay"].detach().to(dtype).requires_grad_()
        found = results(lightning_attention, case, inputs)  # type: ignore[arg-type]
        assert found["log_decay"].dtype == dtype
        assert found["out"].dtype == torch.float32


def test_no_initial_state_is_one_of_zeros() -> None:
    case = Case(documents=DOCUMENTS[18])
    inputs = case.inputs()
    inputs["initial_state"] = torch.zeros_like(inputs["initial_state"]).requires_grad_()
    zeros = results(lightning_attention, case, inputs)  # type: ignore[arg-type]
    del inputs["initial_state"], zeros["initial_state"]
    none = results(lightning_attention, case, inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(none, zeros, rtol=0, atol=1e-13)


@pytest.mark.parametrize("batch", [2, 3])
def test_batch_rows_know_nothing_of_each_other(batch: int) -> None:
    case = Case(batch=batch, tokens=70)
    whole, inputs = _op(case), case.inputs()
    for row in range(batch):
        alone = lightning_attention(
            **{name: x[row : row + 1] for name, x in inputs.items()}  # type: ignore[arg-type]
        )
        torch.testing.assert_close(alone[0][0], whole["out"][row], rtol=0, atol=1e-13)
        assert alone[1] is not None
        torch.testing.assert_close(alone[1][0], whole["state"][row], rtol=0, atol=1e-13)
