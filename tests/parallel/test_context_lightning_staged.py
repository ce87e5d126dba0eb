"""Lightning attention over ranks stage by stage, as GPU kernels run it; here by definition."""

import itertools
from importlib import import_module

import pytest
import torch
from torch import Tensor

from ringctx.ops.lightning.staged import StagedPasses
from ringctx.ops.lightning.stages import Gradients, Problem
from tests.ops.lightning.stages_by_definition import StagesByDefinition
from tests.parallel.lightning_cases import (
    LightningCase,
    assert_matches_oracle,
    differentiate_on_rank,
)
from tests.virtual_ranks import run_virtual


class _Stages:
    """`ringctx.ops.lightning.stages.Stages`, by definition."""

    def states(self, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        return StagesByDefinition(problem, len(k)).states(k, v)

    def state_grads(self, q: Tensor, grad_out: Tensor, problem: Problem) -> Tensor:
        return StagesByDefinition(problem, len(q)).state_grads(q, grad_out)

    def scan_(
        self, updates: Tensor, incoming: Tensor | None, problem: Problem, *, backward: bool
    ) -> Tensor:
        defined = StagesByDefinition(problem, updates.shape[1])
        states, leaving = defined.scan(updates, incoming, backward=backward)
        updates.copy_(states)
        return leaving

    def intra(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        return StagesByDefinition(problem, len(q)).intra(q, k, v)

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
        out = StagesByDefinition(problem, len(q)).outputs(q, k, v, states)
        if intra is not None:
            # What was computed while states travelled is what is needed now.
            own = self.intra(q, k, v, problem)
            out = out - own + intra
        return out

    def intra_grads(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, problem: Problem
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = StagesByDefinition(problem, len(q)).intra_grads(grad_out, q, k, v)
        return dq, dk, dv

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
        defined = StagesByDefinition(problem, len(q))
        dq, dk, dv, running = defined.gradients(
            grad_out, q, k, v, states=states, grad_states=grad_states
        )
        return Gradients(dq, dk, dv, running if of_decay else None)


CASES = [
    LightningCase(
        world_size=world_size,
        layout=layout,
        exchange=exchange,
        documents=documents,
        data_decay=bool((i + i // 2) % 2),
        tokens=36,
    )
    for i, (world_size, layout, exchange, documents) in enumerate(
        itertools.product(
            (2, 3),
            ("contiguous", "zigzag"),
            ("all_gather", "ring"),
            ("one", "around_edges", "of_seven", "random_3", "inside_every_other_part"),
        )
    )
]


@pytest.mark.proves("lightning attention over ranks, forward and backward", on="CPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_float64_recurrence(
    case: LightningCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passes_for(backend: str, *, q: Tensor, v: Tensor) -> StagedPasses:
        assert q.dtype == torch.float64
        return StagedPasses(_Stages())

    # The package exports a function by the name of its module.
    module = import_module("ringctx.parallel.context_lightning")
    monkeypatch.setattr(module, "passes_for", passes_for)
    results = run_virtual(case.world_size, lambda group: differentiate_on_rank(group, case))
    assert_matches_oracle(case, results)
