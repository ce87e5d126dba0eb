"""How a caller says where documents begin: one form, whoever asks."""

import torch
from torch import Tensor

from ringctx.errors import LayoutError

__all__ = ["check_cu_seqlens"]


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """Raise LayoutError unless it is int32 `[documents + 1]` on the CPU, whatever its values."""
    if not isinstance(cu_seqlens, Tensor):
        raise LayoutError(
            f"cu_seqlens is a {type(cu_seqlens).__name__}; it must be an int32 CPU tensor: "
            "torch.tensor([0, ..., seq_len], dtype=torch.int32)"
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device.type != "cpu" or cu_seqlens.ndim != 1:
        raise LayoutError(
            f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}; "
            "it must be int32 [documents + 1] on the CPU: "
            "cu_seqlens.flatten().to('cpu', torch.int32), once, where the batch is made"
        )
