"""How tokens, heads and states are spread over ranks, and what moves when."""

from ringctx.parallel.layout import positions, shard, unshard
from ringctx.parallel.mesh import ContextMesh
from ringctx.parallel.ring_attention import ring_attention

__all__ = ["ContextMesh", "positions", "ring_attention", "shard", "unshard"]

if __name__ != "ringctx.parallel":
    raise ImportError(
        "this folder is the package ringctx.parallel: "
        "write 'import ringctx.parallel', not 'import parallel'"
    )
