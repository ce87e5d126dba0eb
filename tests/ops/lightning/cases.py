"""Cases of lightning attention, what the oracle makes of them, and how both are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringctx.ops.naive_lightning import naive_recurrent
from tests.tolerances import assert_matches, assert_rounded_once, assert_sum_matches

NAMES = ("q", "k", "v", "log_decay", "initial_state")
HALF = (torch.bfloat16, torch.float16)

# Documents of 130 tokens: cut at and around the borders of chunks of 16 to 128, of one token, empty
# ones at the start, the end and between, few and many.
DOCUMENTS = [
    (0, 130),
    (0, 1, 130),
    (0, 129, 130),
    (0, 64, 130),
    (0, 63, 130),
    (0, 65, 130),
    (0, 128, 130),
    (0, 16, 32, 48, 64, 130),
    (0, 15, 31, 48, 66, 130),
    (0, 16, 33, 49, 67, 84, 130),
    (0, 43, 86, 130),
    (0, 1, 2, 3, 4, 5, 130),
    (0, 125, 126, 127, 128, 129, 130),
    (*range(0, 130, 7), 130),
    (*range(0, 131, 2),),
    (*range(131),),
    (0, 0, 130),
    (0, 130, 130),
    (0, 0, 0, 64, 64, 64, 130, 130, 130),
    (0, 5, 5, 70, 70, 71, 71, 130),
    (0, 100, 101, 117, 118, 118, 120, 121, 121, 128, 130),
    (0, 3, 20, 20, 37, 70, 70, 71, 80, 97, 99, 130),
]


@dataclass(frozen=True)
class Case:
    tokens: int = 130
    batch: int = 1
    heads: int = 3
    key_dim: int = 8
    value_dim: int = 5
    per_token: bool = True
    dtype: torch.dtype = torch.float64
    documents: tuple[int, ...] | None = None
    strongest: float = 1.0
    # The decay of a fifth of the tokens, if by token.
    reset: float | None = None

    @property
    def states(self) -> int:
        return self.batch if self.documents is None else len(self.documents) - 1

    @property
    def cu_seqlens(self) -> Tensor | None:
        bounds = self.documents
        return None if bounds is None else torch.tensor(bounds, dtype=torch.int32)

    def inputs(self) -> dict[str, Tensor]:
        """Fresh leaves, the same at every call."""
        numbers = torch.Generator().manual_seed(self.tokens)
        rows = (self.batch, self.tokens, self.heads)

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype)

        wide = torch.promote_types(self.dtype, torch.float32)
        decay = torch.rand(rows if self.per_token else rows[2:], generator=numbers).to(wide)
        log_decay = -self.strongest * decay
        if self.reset is not None:
            log_decay[torch.rand(rows, generator=numbers) < 0.2] = self.reset
        inputs = {
            "q": normal(*rows, self.key_dim, dtype=self.dtype),
            "k": normal(*rows, self.key_dim, dtype=self.dtype),
            "v": normal(*rows, self.value_dim, dtype=self.dtype),
            "log_decay": log_decay,
            "initial_state": normal(
                self.states, self.heads, self.key_dim, self.value_dim, dtype=wide
            ),
        }
        return {name: x.requires_grad_() for name, x in inputs.items()}

    def grads(self) -> tuple[Tensor, Tensor]:
        """Of the output and the state, in the dtypes of these."""
        numbers = torch.Generator().manual_seed(self.tokens + 1)
        out = (self.batch, self.tokens, self.heads, self.value_dim)
        state = (self.states, self.heads, self.key_dim, self.value_dim)
        wide = torch.promote_types(self.dtype, torch.float32)
        return (
            torch.randn(out, generator=numbers).to(self.dtype),
            torch.randn(state, generator=numbers).to(wide),
        )


def results(
    function: Callable[..., tuple[Tensor, Tensor]],
    case: Case,
    inputs: dict[str, Tensor] | None = None,
    **settings: object,
) -> dict[str, Tensor]:
    """Output, state, and the gradients of all inputs."""
    inputs = case.inputs() if inputs is None else inputs
    out, state = function(**inputs, cu_seqlens=case.cu_seqlens, **settings)
    grads = [grad.to(x.dtype) for grad, x in zip(case.grads(), (out, state), strict=True)]
    found = torch.autograd.grad([out, state], list(inputs.values()), grads)
    return {"out": out.detach(), "state": state.detach()} | dict(zip(inputs, found, strict=True))


@lru_cache(maxsize=64)
def oracle(case: Case) -> dict[str, Tensor]:
    # Leaves in float64, or their gradients would be rounded.
    inputs = {name: x.detach().double().requires_grad_() for name, x in case.inputs().items()}
    return results(naive_recurrent, case, inputs)


def assert_exact(actual: dict[str, Tensor], case: Case) -> None:
    """As close to the oracle as the dtypes allow; in 16 bits, rounded once."""
    expected, inputs = oracle(case), case.inputs()
    for name, found in actual.items():
        if name == "log_decay":
            # What moves the sum of decays up to a token moves the weight of its query and, the
            # other way, that of its key; a head's decay has these terms of all tokens.
            terms = (inputs["q"].double() * expected["q"]).sum(-1).detach()
            terms = terms if case.per_token else terms.abs().sum((0, 1))
            assert_sum_matches(name, found, expected[name], terms=terms)
        elif found.dtype in HALF:
            assert_rounded_once(name, found, expected[name])
        else:
            assert_matches(name, found, expected[name], flash=found)
