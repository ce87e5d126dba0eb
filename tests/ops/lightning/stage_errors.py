"""How far an implementation of `Stages` is from the definition: each stage, and all of them joined.

Errors are the largest, relative to the largest entry of the tensor.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ringctx.ops.lightning.chunks import Fragment, cut
from ringctx.ops.lightning.stages import Decay, Problem, Stages
from tests.ops.lightning.stages_by_definition import (
    Case,
    StagesByDefinition,
    attend_whole,
    problem_of,
)

__all__ = ["joined_errors", "make_case", "stage_errors"]


def make_case(
    *,
    lengths: Sequence[int],
    chunk_len: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    batch: int = 1,
    heads: int = 2,
    fixed: bool = False,
    strongest: float = 0.3,
) -> Case:
    """Random inputs, rounded to `dtype`; every other fragment has no slots of states."""
    torch.manual_seed(sum(lengths) + chunk_len + dims[0])
    k_dim, v_dim = dims
    stops = [0, *accumulate(lengths)]
    slots = iter(range(len(lengths)))
    fragments = []
    for index, (start, stop) in enumerate(pairwise(stops)):
        slot = None if index % 2 else next(slots)
        fragments.append(Fragment(start, stop, slot, slot))
    shape = (batch, stops[-1], heads)

    def rounded(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype).double()

    return Case(
        q=rounded(*shape, k_dim),
        k=rounded(*shape, k_dim),
        v=rounded(*shape, v_dim),
        grad_out=rounded(*shape, v_dim),
        log_decay=_decays(shape, strongest=strongest, fixed=fixed),
        chunks=cut(tuple(fragments), chunk_len=chunk_len),
        scale=k_dim**-0.5,
    )


def _decays(shape: tuple[int, ...], *, strongest: float, fixed: bool) -> Tensor:
    heads = shape[2]
    if fixed:
        # From no decay to the strongest.
        return torch.linspace(-strongest, 0, heads).double().expand(shape)
    return -strongest * torch.rand(shape).double()


class _Errors(dict[str, float]):
    def add(self, name: str, actual: Tensor | None, expected: Tensor) -> None:
        assert actual is not None and actual.shape == expected.shape, name
        if expected.numel():
            error = (actual.cpu().double() - expected).abs().max().item()
            # Where all is 0, nothing else will do.
            self[name] = error / expected.abs().max().item() if error else 0.0


def stage_errors(
    stages: Stages, case: Case, *, dtype: torch.dtype, fixed: bool, device: str = "cpu"
) -> dict[str, float]:
    """Each stage by itself, on random states."""
    problem = problem_of(case, fixed=fixed)
    batch = case.q.shape[0]
    oracle, errors = StagesByDefinition(problem, batch), _Errors()
    problem = _on(problem, device)
    wide = (case.q, case.k, case.v)
    q, k, v = (x.to(dtype).to(device) for x in wide)
    grad_out = case.grad_out.to(dtype).to(device)

    sums, sums_back = oracle.states(*wide[1:]), oracle.state_grads(case.q, case.grad_out)
    errors.add("states", stages.states(k, v, problem), sums)
    errors.add("state_grads", stages.state_grads(q, grad_out, problem), sums_back)
    incoming = torch.randn(case.chunks.num_entries, *sums.shape[1:])
    states, grads = sums, sums_back
    for backward in (False, True):
        for name, given in (("", None), (", incoming", incoming)):
            updates = (sums_back if backward else sums).float().to(device)
            leaving = stages.scan_(
                updates, None if given is None else given.to(device), problem, backward=backward
            )
            expected = oracle.scan(
                sums_back if backward else sums,
                None if given is None else given.double(),
                backward=backward,
            )
            direction = "scan back" if backward else "scan"
            errors.add(f"{direction}{name}", updates, expected[0])
            errors.add(f"{direction}{name}, leaving", leaving, expected[1])
            states, grads = (states, expected[0]) if backward else (expected[0], grads)
    states, grads = states.float(), grads.float()

    expected_out = oracle.outputs(*wide, states.double())
    intra = stages.intra(q, k, v, problem)
    errors.add("intra", intra, oracle.intra(*wide))
    parts = stages.intra_grads(grad_out, q, k, v, problem)
    for name, part, exact in zip(
        "qkv", parts, oracle.intra_grads(case.grad_out, *wide), strict=True
    ):
        errors.add(f"intra_grads {name}", part, exact)
    expected_grads = oracle.gradients(
        case.grad_out, *wide, states=states.double(), grad_states=grads.double()
    )
    states, grads = states.to(device), grads.to(device)
    for fused in (True, False):
        name = "fused" if fused else "added"
        out = stages.outputs(q, k, v, states, problem, intra=None if fused else intra)
        assert out.dtype == dtype
        errors.add(f"outputs {name}", out, expected_out)
        found = stages.gradients(
            grad_out,
            q,
            k,
            v,
            states=states,
            grad_states=grads,
            problem=problem,
            intra=None if fused else parts,
            of_decay=fused or not fixed,
        )
        assert found.q.dtype == dtype and found.k.dtype == dtype and found.v.dtype == dtype
        actual = (found.q, found.k, found.v)
        for letter, grad, exact in zip("qkv", actual, expected_grads, strict=False):
            errors.add(f"gradients {letter} {name}", grad, exact)
        if fused or not fixed:
            errors.add(f"gradients decay {name}", found.running, expected_grads[3])
        else:
            assert found.running is None
    return errors


def joined_errors(
    stages: Stages, case: Case, *, dtype: torch.dtype, fixed: bool, device: str = "cpu"
) -> dict[str, float]:
    """All stages as one operation, against autograd through the operation without chunks."""
    chunks, errors = case.chunks, _Errors()
    fragments = chunks.fragments
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.log_decay)]
    with_leaves = replace(case, q=leaves[0], k=leaves[1], v=leaves[2], log_decay=leaves[3])
    batch, _, heads, k_dim = case.q.shape
    size = (len(fragments), batch, heads, k_dim, case.v.shape[3])
    has_slot = torch.tensor([f.entry is not None for f in fragments])
    initial = torch.randn(size).double() * has_slot[:, None, None, None, None]
    grad_leaving = torch.randn(size).double() * has_slot[:, None, None, None, None]
    initial.requires_grad_()
    out, leaving = attend_whole(with_leaves, initial)
    loss = (out * case.grad_out).sum() + (leaving * grad_leaving).sum()
    exact = torch.autograd.grad(loss, [*leaves, initial])

    problem = _on(problem_of(case, fixed=fixed), device)
    q, k, v, grad_out = (x.to(dtype).to(device) for x in (case.q, case.k, case.v, case.grad_out))
    states = stages.states(k, v, problem)
    into = initial.detach().float()[has_slot].to(device)
    left = stages.scan_(states, into, problem, backward=False)
    errors.add("out", stages.outputs(q, k, v, states, problem, intra=None), out.detach())
    errors.add("final state", left, leaving.detach()[has_slot])
    grad_states = stages.state_grads(q, grad_out, problem)
    grad_left = grad_leaving.float()[has_slot].to(device)
    grad_into = stages.scan_(grad_states, grad_left, problem, backward=True)
    errors.add("grad initial", grad_into, exact[4][has_slot])
    grads = stages.gradients(
        grad_out,
        q,
        k,
        v,
        states=states,
        grad_states=grad_states,
        problem=problem,
        intra=None,
        of_decay=True,
    )
    for name, actual, expected in zip("qkv", (grads.q, grads.k, grads.v), exact, strict=False):
        errors.add(f"grad {name}", actual, expected)
    assert grads.running is not None
    grad_decay = []
    for index, fragment in enumerate(fragments):
        part = grads.running[:, fragment.start : fragment.stop].cpu().double()
        part = part.flip(1).cumsum(1).flip(1)
        if fragment.exit is not None:
            at_end = left[fragment.exit].cpu().double() * grad_leaving[index]
            part = part + at_end.sum((-1, -2))[:, None]
        grad_decay.append(part)
    errors.add("grad decay", torch.cat(grad_decay, 1), exact[3])
    return errors


def _on(problem: Problem, device: str) -> Problem:
    decay = problem.decay
    moved = [
        None if x is None else x.to(device) for x in (decay.per_head, decay.running, decay.of_chunk)
    ]
    assert moved[2] is not None
    return Problem(problem.chunks, Decay(moved[0], moved[1], moved[2]), problem.scale)
