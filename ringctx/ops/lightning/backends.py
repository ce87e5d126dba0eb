"""Which implementation computes a call, decided before anything is launched.

    torch     any device and dtype
    triton    our kernels: CUDA; fp16, bf16, fp32; head dims to 256. Where dtype, head dim or GPU is
              not one of these, torch computes the call, and the log says so once
    fla       flash-linear-attention computes whole sequences on one device, see `fla.py`

A device that the kernels cannot run on at all is an error: who asks for Triton on the CPU expects
something that is not there. In Triton's interpreter (TRITON_INTERPRET=1) they run there, slowly.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ringctx.errors import LayoutError
from ringctx.ops.lightning.passes import Passes
from ringctx.ops.lightning.staged import StagedPasses
from ringctx.ops.lightning.streamed import StreamedPasses

__all__ = ["BACKENDS", "check_backend", "passes_for"]

BACKENDS = ("torch", "triton", "fla")

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Capability:
    """What the Triton kernels can compute on a kind of device."""

    dtypes: frozenset[torch.dtype]
    max_head_dim: int = 256
    # Of CUDA; earlier ones have no bf16, and their shared memory has not been checked.
    min_compute: tuple[int, int] | None = None

    def lacks(self, q: Tensor, v: Tensor) -> str | None:
        """What stands in the way of a call, or None."""
        if q.dtype not in self.dtypes:
            return f"dtype {q.dtype}"
        head_dim = max(q.shape[-1], v.shape[-1])
        if head_dim > self.max_head_dim:
            return f"head dim {head_dim}, which is over {self.max_head_dim}"
        if self.min_compute is not None:
            compute = torch.cuda.get_device_capability(q.device)
            if compute < self.min_compute:
                return "compute capability {}.{}, which is under {}.{}".format(
                    *compute, *self.min_compute
                )
        return None


_ON_CUDA = _Capability(
    frozenset({torch.float16, torch.bfloat16, torch.float32}), min_compute=(8, 0)
)
# The interpreter gets bf16 wrong and does not say so.
_IN_INTERPRETER = _Capability(frozenset({torch.float16, torch.float32}))


def check_backend(backend: str) -> None:
    """Raise LayoutError unless it is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise LayoutError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}")


def passes_for(backend: str, *, q: Tensor, v: Tensor) -> Passes:
    """Who computes both passes of a call, for inputs like these.

    Args:
        backend: "torch" or "triton".
        q: `[B, T, H, K]`.
        v: `[B, T, H, V]`.

    Raises:
        LayoutError: if the backend is not known, or cannot run on the device or over ranks.
    """
    check_backend(backend)
    if backend == "fla":
        raise LayoutError(
            "backend='fla' computes whole sequences on one device and takes no states from other "
            "ranks; choose backend='torch' or 'triton' for a sequence over several"
        )
    if backend == "triton":
        lack = _triton_capability(q).lacks(q, v)
        if lack is None:
            # Here, as the import takes a while and Triton may not be installed.
            from ringctx.ops.lightning.triton_stages import TritonStages

            return StagedPasses(TritonStages())
        _say_once(lack)
    return StreamedPasses()


def _triton_capability(q: Tensor) -> _Capability:
    if find_spec("triton") is None:
        raise LayoutError(
            "backend='triton' needs Triton, which is not installed: pip install 'ringctx[gpu]', or "
            "choose backend='torch'"
        )
    if q.device.type == "cuda":
        return _ON_CUDA
    from ringctx.ops.lightning.triton_kernels import INTERPRETED

    if q.device.type == "cpu" and INTERPRETED:
        return _IN_INTERPRETER
    raise LayoutError(
        f"backend='triton' has kernels for CUDA devices only, but q is on {q.device}; choose "
        "backend='torch' (or, to test, set TRITON_INTERPRET=1 before ringctx is imported)"
    )


@lru_cache(maxsize=64)
def _say_once(lack: str) -> None:
    _LOGGER.warning("backend='triton' cannot compute %s; torch computes such calls", lack)
