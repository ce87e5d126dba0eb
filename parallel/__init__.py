"""How tokens, heads and states are spread over ranks, and what moves when."""

from ringctx.parallel.context import ContextParallel, SharedSequence, next_tokens, scale_loss
from ringctx.parallel.context_attention import context_attention
from ringctx.parallel.context_lightning import context_lightning
from ringctx.parallel.layout import positions, shard, unshard
from ringctx.parallel.mesh import ContextMesh, context_mesh
from ringctx.parallel.padding import pad_cu_seqlens, pad_to_layout, unpad
from ringctx.parallel.ring_attention import ring_attention
from ringctx.parallel.ulysses import ulysses_attention

__all__ = [
    "ContextMesh",
    "ContextParallel",
    "SharedSequence",
    "context_attention",
    "context_lightning",
    "context_mesh",
    "next_tokens",
    "pad_cu_seqlens",
    "pad_to_layout",
    "positions",
    "ring_attention",
    "scale_loss",
    "shard",
    "ulysses_attention",
    "unpad",
    "unshard",
]

if __name__ != "ringctx.parallel":
    raise ImportError(
        "this folder is the package ringctx.parallel: "
        "write 'import ringctx.parallel', not 'import parallel'"
    )
