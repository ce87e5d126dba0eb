"""How close is close, per dtype: in one place, never loosened to pass.

fp64 and fp32: the largest error, relative to the tensor's largest entry. bf16: the root mean square
error, against that of one-process flash on the same inputs. (The largest of many roundings to 8
bits is a matter of luck; a single wrong row still shows in the mean.) An lse of bf16 inputs is
fp32, but the CPU kernel's fast exponential is only good to 1e-5.
"""

import torch
from torch import Tensor

__all__ = [
    "assert_close",
    "assert_lse_matches",
    "assert_matches",
    "assert_rounded_once",
    "assert_sum_matches",
]

_LARGEST_ERROR = {torch.float64: 1e-11, torch.float32: 1e-5}
_LARGEST_ERROR_OF_LSE = _LARGEST_ERROR | {torch.bfloat16: 3e-5}
_TIMES_ERROR_OF_FLASH = 1.5


def assert_matches(name: str, actual: Tensor, oracle: Tensor, *, flash: Tensor) -> None:
    """Raise AssertionError unless `actual` is as near to `oracle` as its dtype allows.

    Args:
        name: what the tensors are, for the message.
        actual: the whole tensor under test; its dtype sets the tolerance.
        oracle: the same, in float64.
        flash: the same, from one-process flash in the dtype of `actual`; used for bf16.
    """
    if actual.dtype == torch.bfloat16:
        error, allowed = _rms(actual, oracle), _TIMES_ERROR_OF_FLASH * _rms(flash, oracle)
        _assert_at_most(name, error, allowed)
    else:
        _assert_largest(name, actual, oracle, _LARGEST_ERROR[actual.dtype])


def assert_lse_matches(actual: Tensor, oracle: Tensor, *, dtype: torch.dtype) -> None:
    """`assert_matches` for an lse of inputs of `dtype`."""
    _assert_largest("lse", actual, oracle, _LARGEST_ERROR_OF_LSE[dtype])


def assert_sum_matches(name: str, actual: Tensor, oracle: Tensor, *, terms: Tensor) -> None:
    """`assert_matches` for sums in which terms cancel, as exact as the largest term is.

    Args:
        name: what the tensors are, for the message.
        actual: fp32 or float64.
        oracle: the same, in float64.
        terms: some of what is summed, in float64.
    """
    largest = max(terms.abs().max().item(), oracle.abs().max().item())
    error = (actual - oracle).abs().max().item()
    _assert_at_most(name, error, _LARGEST_ERROR[actual.dtype] * largest)


def assert_rounded_once(name: str, actual: Tensor, oracle: Tensor) -> None:
    """Raise AssertionError unless 16-bit numbers are those of an fp32 result, rounded at its end.

    Args:
        name: what the tensors are, for the message.
        actual: bf16 or fp16.
        oracle: the same, in float64, of the same 16-bit inputs.
    """
    assert actual.shape == oracle.shape, (name, actual.shape, oracle.shape)
    finfo = torch.finfo(actual.dtype)
    # Half of the last bit, half of the smallest number, and what fp32 may be wrong by.
    allowed = oracle.abs() * finfo.eps / 2 + finfo.smallest_normal * finfo.eps / 2
    allowed += _LARGEST_ERROR[torch.float32] * oracle.abs().max()
    excess = ((actual - oracle).abs() / allowed).max().item()
    _assert_at_most(f"{name}, in parts of what is allowed", excess, 1.0)


def _assert_largest(name: str, actual: Tensor, oracle: Tensor, relative: float) -> None:
    assert actual.shape == oracle.shape, (name, actual.shape, oracle.shape)
    error = (actual - oracle).abs().max().item()
    _assert_at_most(name, error, relative * oracle.abs().max().item())


def _assert_at_most(name: str, error: float, allowed: float) -> None:
    # In this direction NaN fails.
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_close(actual: Tensor, expected: Tensor, *, scale: float = 1.0) -> None:
    """Raise AssertionError unless two results of one computation agree as their dtype allows.

    Args:
        actual: fp32 or float64.
        expected: the same shape and dtype.
        scale: how many times the rounding of the computation exceeds that of its result.
    """
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    error = (actual - expected).abs().max().item()
    allowed = scale * _LARGEST_ERROR[actual.dtype] * expected.abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def _rms(actual: Tensor, oracle: Tensor) -> float:
    return (actual - oracle).square().mean().sqrt().item()
