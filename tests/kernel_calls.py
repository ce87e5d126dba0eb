"""Counts which block kernels run: a supported mask must never fall back on the naive one."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ringctx.ops import block_attention

__all__ = ["count_kernel_calls"]


def count_kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """From here on, how often each (kernel, "forward" or "backward") ran, in any thread."""
    calls: Counter[tuple[str, str]] = Counter()
    lock = threading.Lock()

    def counted(kernel: str, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            with lock:
                calls[kernel, name] += 1
            return run(*args, **settings)

        return call

    for kernel, passes in block_attention._KERNELS.items():
        monkeypatch.setitem(
            block_attention._KERNELS,
            kernel,
            dataclasses.replace(
                passes,
                forward=counted(kernel, "forward", passes.forward),
                backward=counted(kernel, "backward", passes.backward),
            ),
        )
    return calls
