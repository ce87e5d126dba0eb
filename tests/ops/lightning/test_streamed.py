"""Passes in groups: what comes from afar, at whatever moment, and what memory they take."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ringctx.ops import lightning_attention
from ringctx.ops.lightning import streamed
from ringctx.ops.lightning.chunks import Fragment, cut
from ringctx.ops.lightning.function import attend
from ringctx.ops.lightning.streamed import StreamedPasses

# The second document of the row goes on from elsewhere, and on to there.
FRAGMENTS = (Fragment(0, 70, entry=0), Fragment(70, 75), Fragment(75, 200, exit=0))


@dataclass
class _Arrival:
    comes_in: Tensor
    polls: int

    def ready(self) -> bool:
        self.polls -= 1
        return self.polls < 0

    def wait(self) -> Tensor:
        return self.comes_in


@dataclass
class _Carry:
    """Brings given states after so many looks."""

    state: Tensor
    grad: Tensor
    polls: int
    left: dict[str, Tensor] = field(default_factory=dict)

    def start(self, leaving: Tensor, decays: Tensor, *, backward: bool) -> _Arrival:
        assert decays.shape[0] == 1
        self.left["backward" if backward else "forward"] = leaving.clone()
        return _Arrival(self.grad if backward else self.state, self.polls)


def _inputs(tokens: int = 200) -> tuple[list[Tensor], Tensor]:
    numbers = torch.Generator().manual_seed(1)
    q, k, v, grad = torch.randn(4, 2, tokens, 3, 4, generator=numbers, dtype=torch.float64)
    log_decay = -torch.rand(2, tokens, 3, generator=numbers, dtype=torch.float64) / 20
    return [x.requires_grad_() for x in (q, k, v, log_decay)], grad


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(streamed._GROUP_BYTES, "cpu", 10_000)


@pytest.mark.parametrize("chunk_len", [16, 32])
def test_states_may_come_at_any_moment_and_give_the_same_bits(chunk_len: int) -> None:
    state, grad_state = torch.randn(2, 1, 2, 3, 4, 4, dtype=torch.float64)
    chunks = cut(FRAGMENTS, chunk_len=chunk_len)
    inputs, grad = _inputs()
    initial = state.clone().requires_grad_()
    arguments = {"chunks": chunks, "passes": StreamedPasses(), "scale": 0.5}
    q, k, v, log_decay = inputs
    out, leaving = attend(q, k, v, log_decay=log_decay, initial=initial, **arguments)  # type: ignore[arg-type]
    expected = torch.autograd.grad([out, leaving], [*inputs, initial], [grad, grad_state])
    seen: list[list[Tensor]] = []
    for polls in (0, 1, 2, 5, 1000):
        carry = _Carry(state, grad_state, polls)
        result, _ = attend(q, k, v, log_decay=log_decay, carry=carry, **arguments)  # type: ignore[arg-type]
        grads = torch.autograd.grad(result, inputs, grad)
        seen.append([result, *grads, *carry.left.values()])
        for actual, wanted in zip((result, *grads), (out, *expected), strict=False):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
        # Nothing that came in is in what leaves: the last fragment has no entry.
        torch.testing.assert_close(carry.left["forward"], leaving, rtol=0, atol=1e-12)
    assert all(torch.equal(x, y) for other in seen[1:] for x, y in zip(seen[0], other, strict=True))


def _peak_bytes(tokens: int, *, backward: bool) -> tuple[int, int]:
    """Most memory that a pass held at once besides its inputs, and that of its results."""
    (q, k, v, _), grad = _inputs(tokens)
    q, k, v, grad = (x.float().detach() for x in (q, k, v, grad))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    log_decay = torch.tensor([-0.1, -0.01, 0.0])

    def run() -> tuple[Tensor, ...]:
        out, _ = lightning_attention(*inputs, log_decay=log_decay)
        return torch.autograd.grad(out, inputs, grad) if backward else (out,)

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        results = run()
    held = peak = 0
    events = [x for x in profiled.profiler.kineto_results.events() if x.name() == "[memory]"]
    for event in sorted(events, key=lambda x: x.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, sum(x.nbytes for x in results)


@pytest.mark.proves("lightning attention: memory linear in tokens", on="CPU")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_is_that_of_the_results_and_of_one_group(backward: bool) -> None:
    sizes = {tokens: _peak_bytes(tokens, backward=backward) for tokens in (4096, 16384)}
    (short, short_results), (long, long_results) = sizes.values()
    # The output is still there in backward.
    kept = 4 * 2 * 3 * 4 * (16384 - 4096) if backward else 0
    grown = long - short - kept
    assert grown <= 1.2 * (long_results - short_results)
