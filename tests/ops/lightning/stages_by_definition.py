"""The stages of chunked linear attention in float64, chunk by chunk, as stages.py defines them.

Written for the eye: dense masks, no care for time. Also the whole operation without chunks, whose
gradients autograd finds. Shapes as in stages.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.ops.lightning.chunks import Chunks
from ringctx.ops.lightning.stages import Decay, Problem

__all__ = ["Case", "StagesByDefinition", "attend_whole", "problem_of", "running_decay"]


@dataclass(frozen=True)
class Case:
    """Float64 inputs of a call and how it is cut."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    log_decay: Tensor
    chunks: Chunks
    scale: float


def running_decay(log_decay: Tensor, chunks: Chunks) -> Tensor:
    """Sum of the log decays `[B, T, H]` from each chunk's first token on."""
    parts = [log_decay[:, start : start + n].cumsum(1) for start, n in chunks.bounds]
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class _Chunk:
    number: int
    rows: slice
    # [B, n, H] and [B, n, n, H]: rows, then keys
    enter: Tensor
    leave: Tensor
    mask: Tensor


class StagesByDefinition:
    """What `Stages` promises; every tensor that goes in or comes out is float64."""

    def __init__(self, problem: Problem, batch: int) -> None:
        self.problem = problem
        decay, chunks = problem.decay, problem.chunks
        if decay.running is not None:
            self.running = decay.running.double()
        else:
            assert decay.per_head is not None
            each = decay.per_head.double().expand(batch, chunks.num_rows, -1)
            self.running = running_decay(each, chunks)

    def _chunks(self) -> Iterator[_Chunk]:
        for number, (start, n) in enumerate(self.problem.chunks.bounds):
            b = self.running[:, start : start + n]
            distance = b[:, :, None] - b[:, None]
            past = torch.ones(n, n, dtype=torch.bool).tril()[None, :, :, None]
            mask = torch.where(past, distance, -torch.inf).exp() * self.problem.scale
            enter, leave = b.exp() * self.problem.scale, (b[:, -1:] - b).exp()
            yield _Chunk(number, slice(start, start + n), enter, leave, mask)

    def states(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.einsum("bthk,bth,bthv->bhkv", k[:, c.rows], c.leave, v[:, c.rows])
                for c in self._chunks()
            ]
        )

    def state_grads(self, q: Tensor, grad_out: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.einsum("bthk,bth,bthv->bhkv", q[:, c.rows], c.enter, grad_out[:, c.rows])
                for c in self._chunks()
            ]
        )

    def scan(
        self, updates: Tensor, incoming: Tensor | None, *, backward: bool
    ) -> tuple[Tensor, Tensor]:
        """States by chunk, and those that leave by slot."""
        chunks, states = self.problem.chunks, torch.empty_like(updates)
        leaving: dict[int, Tensor] = {}
        for fragment, first, end in zip(
            chunks.fragments, chunks.first, chunks.first[1:], strict=False
        ):
            source, target = fragment.entry, fragment.exit
            if backward:
                source, target = target, source
            state = torch.zeros_like(updates[0])
            if incoming is not None and source is not None:
                state = incoming[source]
            order = range(first, end)
            for number in reversed(order) if backward else order:
                states[number] = state
                start, n = chunks.bounds[number]
                factor = self.running[:, start + n - 1].exp()
                state = factor[:, :, None, None] * state + updates[number]
            if target is not None:
                leaving[target] = state
        slots = [leaving[slot] for slot in sorted(leaving)]
        return states, torch.stack(slots) if slots else updates[:0]

    def intra(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat(
            [
                torch.einsum(
                    "bihk,bjhk,bijh,bjhv->bihv", q[:, c.rows], k[:, c.rows], c.mask, v[:, c.rows]
                )
                for c in self._chunks()
            ],
            1,
        )

    def outputs(self, q: Tensor, k: Tensor, v: Tensor, states: Tensor) -> Tensor:
        beyond = [
            torch.einsum("bthk,bth,bhkv->bthv", q[:, c.rows], c.enter, states[c.number])
            for c in self._chunks()
        ]
        return self.intra(q, k, v) + torch.cat(beyond, 1)

    def intra_grads(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        parts = []
        for c in self._chunks():
            do, cq, ck, cv = (x[:, c.rows] for x in (grad_out, q, k, v))
            parts.append(
                (
                    torch.einsum("bihv,bjhv,bijh,bjhk->bihk", do, cv, c.mask, ck),
                    torch.einsum("bihv,bjhv,bijh,bihk->bjhk", do, cv, c.mask, cq),
                    torch.einsum("bihk,bjhk,bijh,bihv->bjhv", cq, ck, c.mask, do),
                )
            )
        return [torch.cat(grads, 1) for grads in zip(*parts, strict=True)]

    def gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        states: Tensor,
        grad_states: Tensor,
    ) -> list[Tensor]:
        """Of q, k, v and the running decay."""
        parts = []
        for c in self._chunks():
            do, ck, cv = (x[:, c.rows] for x in (grad_out, k, v))
            state, grad = states[c.number], grad_states[c.number]
            parts.append(
                (
                    torch.einsum("bth,bthv,bhkv->bthk", c.enter, do, state),
                    torch.einsum("bth,bthv,bhkv->bthk", c.leave, cv, grad),
                    torch.einsum("bth,bthk,bhkv->bthv", c.leave, ck, grad),
                )
            )
        beyond = [torch.cat(grads, 1) for grads in zip(*parts, strict=True)]
        within = self.intra_grads(grad_out, q, k, v)
        dq, dk, dv = (x + y for x, y in zip(within, beyond, strict=True))
        return [dq, dk, dv, (q * dq).sum(-1) - (k * dk).sum(-1)]


def attend_whole(case: Case, incoming: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and the state leaving each fragment; one state comes into each, by number."""
    outs, leaving = [], []
    for number, fragment in enumerate(case.chunks.fragments):
        rows = slice(fragment.start, fragment.stop)
        q, k, v = case.q[:, rows], case.k[:, rows], case.v[:, rows]
        b = case.log_decay[:, rows].cumsum(1)
        n = b.shape[1]
        past = torch.ones(n, n, dtype=torch.bool).tril()[None, :, :, None]
        mask = torch.where(past, b[:, :, None] - b[:, None], -torch.inf).exp()
        out = torch.einsum("bihk,bjhk,bijh,bjhv->bihv", q, k, mask, v)
        out = out + torch.einsum("bthk,bth,bhkv->bthv", q, b.exp(), incoming[number])
        outs.append(case.scale * out)
        last = torch.einsum("bthk,bth,bthv->bhkv", k, (b[:, -1:] - b).exp(), v)
        leaving.append(b[:, -1].exp()[:, :, None, None] * incoming[number] + last)
    return torch.cat(outs, 1), torch.stack(leaving)


def problem_of(case: Case, *, fixed: bool) -> Problem:
    """The problem of a case, for fp32 or less; a fixed decay is that of the first token."""
    if fixed:
        per_head = case.log_decay[0, 0].float()
        of_chunk = torch.stack([n * per_head.double() for _, n in case.chunks.bounds])[:, None]
        return Problem(case.chunks, Decay(per_head, None, of_chunk.contiguous()), case.scale)
    running = running_decay(case.log_decay, case.chunks)
    ends = [start + n - 1 for start, n in case.chunks.bounds]
    of_chunk = running[:, ends].transpose(0, 1).contiguous()
    return Problem(case.chunks, Decay(None, running, of_chunk), case.scale)
