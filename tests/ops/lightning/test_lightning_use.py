"""The op in programs: pieces and steps, autograd's modes, odd inputs, torch.compile, memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ringctx.ops import lightning_attention, lightning_step
from tests.ops.lightning.cases import DOCUMENTS, NAMES, Case, assert_exact, oracle, results

TOKEN = ("q", "k", "v", "log_decay")


def _of_tokens(inputs: dict[str, Tensor], rows: slice, *, per_token: bool) -> dict[str, Tensor]:
    names = TOKEN if per_token else TOKEN[:3]
    return {name: x[:, rows] if name in names else x for name, x in inputs.items()}


@pytest.mark.proves("lightning attention, forward and backward", on="CPU")
@pytest.mark.parametrize("per_token", [False, True], ids=["per head", "per token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pieces_and_then_steps_equal_the_whole_with_gradients(
    dtype: torch.dtype, per_token: bool
) -> None:
    case = Case(batch=2, tokens=130, per_token=per_token, dtype=dtype)
    inputs = case.inputs()

    def in_pieces(
        initial_state: Tensor, cu_seqlens: None, **given: Tensor
    ) -> tuple[Tensor, Tensor]:
        state, outs = initial_state, []
        for rows in (slice(0, 1), slice(1, 70), slice(70, 123)):
            piece = _of_tokens(given, rows, per_token=per_token)
            out, left = lightning_attention(**piece, initial_state=state)  # type: ignore[arg-type]
            assert left is not None
            state = left
            outs.append(out)
        for token in range(123, 130):
            one = {
                name: x[:, token] if name != "log_decay" or per_token else x
                for name, x in given.items()
            }
            out, state = lightning_step(**one, state=state)  # type: ignore[arg-type]
            outs.append(out.unsqueeze(1))
        return torch.cat(outs, 1), state

    assert_exact(results(in_pieces, case, inputs), case)


@pytest.mark.parametrize("per_token", [False, True], ids=["per head", "per token"])
@pytest.mark.parametrize("changed", [1, 63, 64, 100, 129])
def test_a_later_token_changes_no_bit_of_an_earlier_output(changed: int, per_token: bool) -> None:
    case = Case(per_token=per_token, dtype=torch.float32)
    inputs = {name: x.detach() for name, x in case.inputs().items()}
    before, _ = lightning_attention(**inputs)  # type: ignore[arg-type]
    for name in TOKEN if per_token else TOKEN[:3]:
        inputs[name][:, changed:] = -torch.rand(inputs[name][:, changed:].shape)
    after, _ = lightning_attention(**inputs)  # type: ignore[arg-type]
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@pytest.mark.parametrize("documents", DOCUMENTS[7:10])
def test_another_document_changes_no_bit(documents: tuple[int, ...]) -> None:
    case = Case(documents=documents, dtype=torch.float32)
    inputs = {name: x.detach() for name, x in case.inputs().items()}
    before = lightning_attention(**inputs, cu_seqlens=case.cu_seqlens)  # type: ignore[arg-type]
    start, stop = documents[2:4]
    for name in TOKEN:
        inputs[name][:, start:stop] = -torch.rand(inputs[name][:, start:stop].shape)
    inputs["initial_state"][2] += 1
    after = lightning_attention(**inputs, cu_seqlens=case.cu_seqlens)  # type: ignore[arg-type]
    others = [slice(0, start), slice(stop, None)]
    assert all(torch.equal(before[0][:, rows], after[0][:, rows]) for rows in others)
    assert before[1] is not None
    assert after[1] is not None
    same = [bool(torch.equal(x, y)) for x, y in zip(before[1], after[1], strict=True)]
    assert same == [i != 2 for i in range(len(same))]


def test_inputs_in_any_memory_layout_give_the_same_bits() -> None:
    case = Case(batch=2)
    plain = results(lightning_attention, case)  # type: ignore[arg-type]
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "heads first": lambda x: x.transpose(1, -2).contiguous().transpose(1, -2),
        "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    }
    for change in layouts.values():
        inputs = {name: change(x.detach()).requires_grad_() for name, x in case.inputs().items()}
        assert any(not x.is_contiguous() for x in inputs.values())
        found = results(lightning_attention, case, inputs)  # type: ignore[arg-type]
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_expanded_inputs_and_gradients_are_taken() -> None:
    case = Case(tokens=33, key_dim=1, value_dim=1, per_token=False)
    inputs = case.inputs()
    same = {name: x.detach()[:, :, :1].expand(x.shape) for name, x in inputs.items() if x.ndim == 4}
    inputs |= {name: same[name].requires_grad_() for name in ("q", "k", "v")}
    out, _ = lightning_attention(**inputs)  # type: ignore[arg-type]
    out.sum().backward()
    assert inputs["q"].grad is not None
    assert inputs["q"].grad.isfinite().all()


def test_calls_repeat_to_the_bit_and_change_no_input() -> None:
    case = Case(documents=DOCUMENTS[13])
    inputs = case.inputs()
    first = results(lightning_attention, case, inputs)  # type: ignore[arg-type]
    second = results(lightning_attention, case, inputs)  # type: ignore[arg-type]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(inputs[name], x) for name, x in case.inputs().items())


@pytest.mark.parametrize("wanted", NAMES)
def test_the_gradient_of_one_input_alone_is_that_of_all(wanted: str) -> None:
    case = Case(tokens=70)
    inputs = {name: x if name == wanted else x.detach() for name, x in case.inputs().items()}
    out, state = _with_state(**inputs)
    grads = torch.autograd.grad([out, state], [inputs[wanted]], case.grads())
    assert_exact({wanted: grads[0]}, case)


@pytest.mark.parametrize("part", ["out", "state"])
def test_gradients_come_through_the_output_or_the_state_alone(part: str) -> None:
    case = Case(tokens=70, documents=(0, 20, 20, 70))
    grads = []
    for function in (_with_state, _oracle_function):
        inputs = case.inputs()
        out, state = function(**inputs, cu_seqlens=case.cu_seqlens)
        loss = {"out": out, "state": state}[part]
        grads.append(
            torch.autograd.grad(
                loss,
                list(inputs.values()),
                case.grads()[part == "state"].double(),
                materialize_grads=True,
            )
        )
    torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


def _with_state(**given: Any) -> tuple[Tensor, Tensor]:
    out, state = lightning_attention(**given)
    assert state is not None
    return out, state


def _oracle_function(**given: Any) -> tuple[Tensor, Tensor]:
    from ringctx.ops.naive_lightning import naive_quadratic

    return naive_quadratic(**given)


def test_without_gradients_nothing_is_kept_and_the_state_is_optional() -> None:
    case = Case(tokens=70)
    inputs = case.inputs()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out, state = lightning_attention(**inputs)  # type: ignore[arg-type]
        assert state is not None
        assert not out.requires_grad
        assert_exact({"out": out.clone(), "state": state.clone()}, case)
    # What inference kept for itself is no hindrance.
    assert_exact(results(lightning_attention, case), case)  # type: ignore[arg-type]
    out, state = lightning_attention(**inputs, return_state=False)  # type: ignore[arg-type]
    assert state is None
    assert_exact({"out": out}, case)


def test_a_second_derivative_is_refused() -> None:
    inputs = Case(tokens=5).inputs()
    out, _ = lightning_attention(**inputs)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(out.square().sum(), [inputs["v"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_rounds_neither_states_nor_sums() -> None:
    case = Case(dtype=torch.float32)
    inputs = case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lightning_attention, case, inputs)  # type: ignore[arg-type]
        one = _of_tokens(inputs, slice(0, 1), per_token=True)
        step: dict[str, Any] = {name: x[:, 0] for name, x in one.items() if name != "initial_state"}
        out, state = lightning_step(**step, state=inputs["initial_state"])
    assert_exact(found, case)
    expected, left = _oracle_function(**one)
    torch.testing.assert_close(out.double(), expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(state.double(), left, rtol=0, atol=1e-5)


def test_recomputing_it_in_backward_gives_the_same_bits() -> None:
    case = Case(documents=DOCUMENTS[9])
    plain = results(lightning_attention, case)  # type: ignore[arg-type]

    def again(**given: Any) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = checkpoint(lightning_attention, use_reentrant=False, **given)
        return out

    found = results(again, case)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


# The compiler looks for gradients of what it goes on with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_code_around_it_computes_the_same() -> None:
    case = Case(tokens=70, dtype=torch.float32)

    def around(**given: Any) -> tuple[Tensor, Tensor]:
        given["q"] = given["q"] * 2
        out, state = lightning_attention(**given)
        assert state is not None
        return out / 2, state

    compiled = torch.compile(around, backend="aot_eager")
    assert_exact(results(compiled, case), case)


@pytest.mark.parametrize("documents", [None, (0, 0, 0)], ids=["one", "packed"])
def test_no_tokens_pass_states_on(documents: tuple[int, ...] | None) -> None:
    case = Case(tokens=0, documents=documents, dtype=torch.float32)
    found = results(lightning_attention, case)  # type: ignore[arg-type]
    assert found["out"].shape == (1, 0, 3, 5)
    assert torch.equal(found["state"], case.inputs()["initial_state"])
    assert torch.equal(found["initial_state"], case.grads()[1])
    inputs = case.inputs()
    del inputs["initial_state"]
    _, state = lightning_attention(**inputs, cu_seqlens=case.cu_seqlens)  # type: ignore[arg-type]
    assert state is not None
    assert torch.equal(state, torch.zeros(case.states, 3, 8, 5))


def test_the_oracle_of_a_case_is_the_recurrence() -> None:
    assert oracle(Case(tokens=1))["out"].dtype == torch.float64
