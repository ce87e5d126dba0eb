"""Both passes in torch, a group of chunks at a time, on any device.

One idea: a group of chunks goes through all products while it is in the cache, and only the state
at its border is kept; backward goes from the last group to the first and computes the states within
a group again from that border. Neither states nor gradients of states exist for the whole sequence,
so time is linear in the tokens, and memory is that of inputs and results.

    forward    U = (writes K)^T V -> scan    O = (pairs . Q K^T) V + (reads Q) S
    backward   U, W = (reads Q)^T dO -> scans    P = pairs . Q K^T    dP = pairs . dO V^T
               dQ = dP K + reads dO S^T    dK = dP^T Q + writes V G^T    dV = P^T dO + (writes K) G

With a carry the U (backward: W) of all groups come first, for what they add up to is what the rank
sends; they are computed again later, which costs no more than fresh memory for all of them. Then
groups do what needs no incoming state (P, dP and their products) until the states have arrived, and
the rest after that: what the exchange takes decides how many.

Price, per token and head, forward: C (K + V) + 2 K V multiply-adds for chunks of C tokens; backward
2.5 times that. Half precision inputs are computed in fp32.
Shapes: as `stages.py`; n chunks of L rows in a group.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ringctx.ops.lightning.groups import Group, groups_of
from ringctx.ops.lightning.passes import Arrival, Backward, Carry, Forward, entry_decays
from ringctx.ops.lightning.scan import Scan
from ringctx.ops.lightning.stages import Problem, wide_dtype
from ringctx.ops.lightning.weights import Weights, WeightSource
from ringctx.ops.lightning.workspace import Workspace, add_product_

__all__ = ["StreamedPasses"]

# Bytes of one tensor of a group: several must fit a core's cache. A GPU wants fewer, larger calls.
_GROUP_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}


class StreamedPasses:
    """See `passes.Passes`."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        problem: Problem,
        initial: Tensor | None,
        carry: Carry | None,
    ) -> Forward:
        """The output and the leaving states."""
        work = _Work(problem, q, v)
        inputs = (q, k, v)
        early: dict[int, Tensor] = {}
        leaving = None
        if carry is not None:
            leaving = work.ends(k, v, backward=False)
            arrival = carry.start(leaving, entry_decays(problem), backward=False)
            for index, group in work.until_ready(arrival, backward=False):
                early[index] = work.seen(work.weights(group), *work.take(inputs, group), fresh=True)
            initial = arrival.wait()
        scan = Scan(problem, initial, like=work.no_state, backward=False)
        out = torch.empty_like(v)
        borders = work.no_state.new_empty((len(work), *work.no_state.shape[1:]))
        for index, group in work.order(backward=False):
            borders[index].copy_(scan.state)
            weights = work.weights(group)
            queries, keys, values = taken = work.take(inputs, group)
            seen = early.pop(index, None)
            if seen is None:
                seen = work.seen(weights, *taken, fresh=False)
            added = work.product(keys.mul_(weights.writes).mT, values, "added")
            states = work.between("states", added)
            scan.run(added, group.chunks, states=states)
            add_product_(seen, queries.mul_(weights.reads), states[:-1])
            group.put_(out, seen)
        return Forward(out, scan.outgoing if leaving is None else leaving, (borders, initial))

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        problem: Problem,
        grad_leaving: Tensor | None,
        kept: tuple[Tensor | None, ...],
        carry: Carry | None,
        of_decay: bool,
    ) -> Backward:
        """All gradients."""
        work = _Work(problem, q, v)
        borders, initial = kept
        assert borders is not None
        inputs = (grad_out, q, k, v)
        early: dict[int, _Gradients] = {}
        grad_entering = None
        if carry is not None:
            grad_entering = work.ends(q, grad_out, backward=True)
            arrival = carry.start(grad_entering, entry_decays(problem), backward=True)
            for index, group in work.until_ready(arrival, backward=True):
                taken = work.take(inputs, group)
                early[index] = work.seen_grads(work.weights(group), *taken, fresh=True)
            grad_leaving = arrival.wait()
        forth = Scan(problem, initial, like=work.no_state, backward=False)
        back = Scan(problem, grad_leaving, like=work.no_state, backward=True)
        results = [torch.empty_like(x) for x in (q, k, v)]
        of_tokens = q.new_empty((*q.shape[:3], 1), dtype=torch.float64) if of_decay else None
        for index, group in work.order(backward=True):
            weights = work.weights(group)
            grads_out, queries, keys, values = taken = work.take(inputs, group)
            grads = early.pop(index, None)
            if grads is None:
                grads = work.seen_grads(weights, *taken, fresh=False)
            added = work.product(keys.mul_(weights.writes).mT, values, "added")
            forth.state, states = borders[index], work.between("states", added)
            forth.run(added, group.chunks, states=states)
            added = work.product(queries.mT, grads_out.mul_(weights.reads), "added")
            passed_on = work.empty("passed_on", added.shape) if of_decay else None
            grad_states = work.between("grad_states", added)
            back.run(added, group.chunks, states=grad_states, after=passed_on)
            entering, leaving = states[:-1], grad_states[1:]
            add_product_(grads[0], grads_out, entering.mT)
            add_product_(grads[1], values.mul_(weights.writes), leaving.mT)
            add_product_(grads[2], keys, leaving)
            for result, grad in zip(results, grads, strict=True):
                group.put_(result, grad)
            if of_tokens is not None and passed_on is not None:
                (keys,) = work.take((k,), group)
                running = (queries * grads[0]).sum(-1) - (keys * grads[1]).sum(-1)
                through = (entering * passed_on).sum((-2, -1))
                group.put_(of_tokens, _decay_gradient(running, through).unsqueeze(-1))
        return Backward(
            q=results[0],
            k=results[1],
            v=results[2],
            log_decay=None if of_tokens is None else of_tokens.squeeze(-1),
            entering=back.outgoing if grad_entering is None else grad_entering,
        )


_Gradients = tuple[Tensor, Tensor, Tensor]


class _Work(Workspace):
    """The groups of one pass, their factors and their memory."""

    def __init__(self, problem: Problem, q: Tensor, v: Tensor) -> None:
        super().__init__(dtype=wide_dtype(q), device=q.device)
        (batch, _, heads, key_dim), value_dim = q.shape, v.shape[-1]
        widest = max(key_dim, value_dim, problem.chunks.chunk_len)
        group_bytes = _GROUP_BYTES.get(q.device.type, _GROUP_BYTES["cuda"])
        most_rows = group_bytes // (batch * heads * widest * self.dtype.itemsize)
        self._problem = problem
        self._groups = groups_of(problem.chunks, most_rows=max(1, most_rows), device=q.device)
        self._source = WeightSource(problem, dtype=self.dtype)
        self.no_state = self.empty(None, (0, batch, heads, key_dim, value_dim))
        """To make states like."""

    def __len__(self) -> int:
        return len(self._groups)

    def order(self, *, backward: bool) -> Iterator[tuple[int, Group]]:
        """Groups with their numbers."""
        numbered = enumerate(self._groups)
        return reversed(list(numbered)) if backward else iter(numbered)

    def until_ready(self, arrival: Arrival, *, backward: bool) -> Iterator[tuple[int, Group]]:
        """Groups in order, as long as the exchange is under way."""
        for numbered in self.order(backward=backward):
            if arrival.ready():
                return
            yield numbered

    def weights(self, group: Group) -> Weights:
        """Factors of a group."""
        return self._source.of(group)

    def take(self, inputs: Sequence[Tensor], group: Group) -> list[Tensor]:
        """The rows of a group of every input, to be changed at will: `[n, B, H, L, D]` each."""
        return [
            group.take(
                x,
                into=self.empty(
                    f"input {i}", (group.count, x.shape[0], x.shape[2], group.length, x.shape[3])
                ),
            )
            for i, x in enumerate(inputs)
        ]

    def between(self, name: str, updates: Tensor) -> Tensor:
        """Memory for the states between chunks, `[n + 1, B, H, K, V]`."""
        return self.empty(name, (len(updates) + 1, *updates.shape[1:]))

    def ends(self, x: Tensor, y: Tensor, *, backward: bool) -> Tensor:
        """What fragments leave if nothing comes in, by slot.

        Args:
            x: k (backward: q).
            y: v (backward: the output's gradient).
            backward: which of the two.
        """
        scan = Scan(self._problem, None, like=self.no_state, backward=backward)
        for _, group in self.order(backward=backward):
            rows, columns = self.take((x, y), group)
            weights = self.weights(group)
            (columns if backward else rows).mul_(weights.reads if backward else weights.writes)
            scan.run(self.product(rows.mT, columns, "added"), group.chunks)
        return scan.outgoing

    def seen(self, weights: Weights, q: Tensor, k: Tensor, v: Tensor, *, fresh: bool) -> Tensor:
        """What queries see of their own chunks, `[n, B, H, L, V]`."""
        scores = self.product(q, k.mT, "scores").mul_(weights.pairs)
        return self.product(scores, v, None if fresh else "seen")

    def seen_grads(
        self,
        weights: Weights,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        fresh: bool,
    ) -> _Gradients:
        """Gradients of q, k and v of `seen`."""
        names = (None,) * 3 if fresh else ("grad_q", "grad_k", "grad_v")
        grad_scores = self.product(grad_out, v.mT, "scores").mul_(weights.pairs)
        grad_q = self.product(grad_scores, k, names[0])
        grad_k = self.product(grad_scores.mT, q, names[1])
        scores = self.product(q, k.mT, "scores").mul_(weights.pairs)
        return grad_q, grad_k, self.product(scores.mT, grad_out, names[2])


def _decay_gradient(running: Tensor, through: Tensor) -> Tensor:
    """From the gradient of the running decay to that of each token's, `[n, B, H, L]`, float64.

    dg_t = <S_n, G_{n-1}> minus the sum over s < t in the chunk of db_s: the decay of a chunk's
    first token scales all that enters. The same as the sum over s >= t and what leaves.
    Counted by chunk: over a whole sequence rounding would grow with its length.

    Args:
        running: db, `[n, B, H, L]`.
        through: `<S_n, G_{n-1}>`, of the state that enters and its gradient, `[n, B, H]`.
    """
    running = running.double()
    return through.double().unsqueeze(-1) - (running.cumsum(-1) - running)
