"""The stages of chunked linear attention by Triton kernels: CUDA; fp16, bf16 and fp32.

One idea: a stage allocates its results, gives tensors their roles in one of three kernels
(see triton_kernels.py), and launches it.

Price: each gradient is a launch of its own: six products inside chunks in backward where one kernel
for all would take five, and would spill.
Source of the stages: stages.py. Shapes: B batch, T tokens, H heads, K and V head dims, N chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from ringctx.ops.lightning import triton_kernels
from ringctx.ops.lightning.stages import Gradients, Problem
from ringctx.ops.lightning.triton_launch import (
    SCAN_TILE,
    Launch,
    attend_tiles,
    run,
    sum_tiles,
    tables,
)

__all__ = ["TritonStages"]


@dataclass(frozen=True, eq=False)
class TritonStages:
    """`Stages` by Triton kernels, for head dims up to 256 in fp16, bf16 or fp32."""

    launch: Callable[[Launch], None] = field(default=run)
    """What is done with each launch."""

    def states(self, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        """What every chunk adds to the state; see `Stages`."""
        return self._sum(k, v, problem, to_end=True)

    def state_grads(self, q: Tensor, grad_out: Tensor, problem: Problem) -> Tensor:
        """What every chunk adds to the gradient of the state; see `Stages`."""
        return self._sum(q, grad_out, problem, to_end=False)

    def scan_(
        self, updates: Tensor, incoming: Tensor | None, problem: Problem, *, backward: bool
    ) -> Tensor:
        """Run a state through the chunks of each fragment; see `Stages`."""
        chunks, of_chunk = problem.chunks, problem.decay.of_chunk
        _, batch, heads, *matrix = updates.shape
        size = matrix[0] * matrix[1]
        table = tables(chunks, updates.device)
        slots = chunks.num_entries if backward else chunks.num_exits
        leaving = updates.new_empty((slots, *updates.shape[1:]))
        arguments: dict[str, Tensor | float | None] = {
            "states": updates,
            "incoming": incoming,
            "leaving": leaving,
            "of_chunk": of_chunk,
            "firsts": table.firsts,
            "sources": table.exits if backward else table.entries,
            "targets": table.entries if backward else table.exits,
            "B": batch,
            "H": heads,
            "decay_batch": of_chunk.shape[1],
        }
        constants = {"SIZE": size, "BACKWARD": backward, "TILE": SCAN_TILE}
        programs = len(chunks.fragments) * batch * heads * triton.cdiv(size, SCAN_TILE)
        self.launch(Launch(triton_kernels.run_states, programs, arguments, constants, num_warps=4))
        return leaving

    def intra(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        """What tokens see of their own chunk; see `Stages`."""
        out = torch.empty_like(v, dtype=torch.float32)
        self._attend(out, q, k, v, problem=problem)
        return out

    def outputs(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        states: Tensor,
        problem: Problem,
        *,
        intra: Tensor | None,
    ) -> Tensor:
        """The whole output; see `Stages`."""
        out = _result(intra, like=v)
        self._attend(out, q, k, v, problem=problem, beyond=states, partial=intra)
        return out

    def intra_grads(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, problem: Problem
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v within chunks; see `Stages`."""
        grad_q, grad_k, grad_v = (torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))
        self._attend(grad_q, grad_out, v, k, problem=problem)
        self._attend(grad_k, v, grad_out, q, problem=problem, future=True)
        self._attend(grad_v, k, q, grad_out, problem=problem, future=True)
        return grad_q, grad_k, grad_v

    def gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        states: Tensor,
        grad_states: Tensor,
        problem: Problem,
        intra: tuple[Tensor, Tensor, Tensor] | None,
        of_decay: bool,
    ) -> Gradients:
        """The whole gradients; see `Stages`."""
        parts = intra or (None, None, None)
        grad_q, grad_k, grad_v = (
            _result(part, like=x) for part, x in zip(parts, (q, k, v), strict=True)
        )
        dots_q = self._attend(
            grad_q,
            *(grad_out, v, k),
            problem=problem,
            beyond=states,
            transposed=True,
            partial=parts[0],
            dot_with=q if of_decay else None,
        )
        dots_k = self._attend(
            grad_k,
            *(v, grad_out, q),
            problem=problem,
            beyond=grad_states,
            transposed=True,
            future=True,
            partial=parts[1],
            dot_with=k if of_decay else None,
        )
        self._attend(
            grad_v,
            *(k, q, grad_out),
            problem=problem,
            beyond=grad_states,
            future=True,
            partial=parts[2],
        )
        running = None if dots_q is None or dots_k is None else dots_q - dots_k
        return Gradients(grad_q, grad_k, grad_v, running)

    def _sum(self, x: Tensor, y: Tensor, problem: Problem, *, to_end: bool) -> Tensor:
        """What the chunks sum up to, `[N, B, H, X, Y]`, fp32."""
        chunk_len, num_chunks = problem.chunks.chunk_len, len(problem.chunks.bounds)
        (batch, _, heads, x_dim), y_dim = x.shape, y.shape[3]
        out = x.new_empty((num_chunks, batch, heads, x_dim, y_dim), dtype=torch.float32)
        tiles = sum_tiles(chunk_len, x_dim, y_dim, x.dtype)
        arguments = {"out": out, "x": x, "y": y} | _common(x, problem)
        constants = {
            "X": x_dim,
            "Y": y_dim,
            "CHUNK": chunk_len,
            "TO_END": to_end,
            "TILE_ROWS": tiles.rows,
            "TILE_X": tiles.inner,
            "TILE_Y": tiles.outer,
        }
        per_chunk = triton.cdiv(x_dim, tiles.inner) * triton.cdiv(y_dim, tiles.outer)
        programs = num_chunks * batch * heads * per_chunk
        self.launch(Launch(triton_kernels.sum_chunks, programs, arguments, constants, tiles.warps))
        return out

    def _attend(
        self,
        out: Tensor,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        *,
        problem: Problem,
        beyond: Tensor | None = None,
        transposed: bool = False,
        future: bool = False,
        partial: Tensor | None = None,
        dot_with: Tensor | None = None,
    ) -> Tensor | None:
        """Launch `attend_chunks` into `out`, within chunks only where there is no `partial`.

        Returns:
            dot_with . out, not rounded, `[B, T, H]`, fp32.
        """
        chunk_len, num_chunks = problem.chunks.chunk_len, len(problem.chunks.bounds)
        (batch, tokens, heads, x_dim), z_dim = x.shape, z.shape[3]
        tiles = attend_tiles(chunk_len, x_dim, z_dim, x.dtype)
        columns = triton.cdiv(z_dim, tiles.outer)
        dots = None
        if dot_with is not None:
            dots = x.new_empty((columns, batch, tokens, heads), dtype=torch.float32)
        arguments = {
            "out": out,
            "partial": partial,
            "dots": dots,
            "companion": dot_with,
            "x": x,
            "y": y if partial is None else None,
            "z": z if partial is None else None,
            "beyond": beyond,
        } | _common(x, problem)
        constants = {
            "X": x_dim,
            "Z": z_dim,
            "CHUNK": chunk_len,
            "FUTURE": future,
            "TRANSPOSED": transposed,
            "TILE_ROWS": tiles.rows,
            "TILE_KEYS": tiles.keys,
            "TILE_X": tiles.inner,
            "TILE_Z": tiles.outer,
        }
        programs = num_chunks * batch * heads * (chunk_len // tiles.rows) * columns
        self.launch(
            Launch(triton_kernels.attend_chunks, programs, arguments, constants, tiles.warps)
        )
        return None if dots is None else dots.sum(0)


def _common(x: Tensor, problem: Problem) -> dict[str, Tensor | float | None]:
    """Arguments that both kernels over chunks take."""
    table = tables(problem.chunks, x.device)
    batch, tokens, heads = x.shape[:3]
    return {
        "per_head": problem.decay.per_head,
        "running": problem.decay.running,
        "starts": table.starts,
        "lengths": table.lengths,
        "scale": problem.scale,
        "B": batch,
        "T": tokens,
        "H": heads,
    }


def _result(partial: Tensor | None, *, like: Tensor) -> Tensor:
    """Where a result goes: over its fp32 part, which programs read first, if that is its dtype."""
    if partial is not None and partial.dtype == like.dtype:
        return partial
    return torch.empty_like(like)
