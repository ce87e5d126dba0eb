"""Reading in pieces and writing token by token equals the whole pass, for every kind of layer."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from ringctx.config import DecayStyle, ModelConfig
from ringctx.errors import ConfigError
from ringctx.generate import Cache, extend, generate
from ringctx.kv_cache import KeyCache
from ringctx.mixers import Rows
from ringctx.model import Transformer, initialise
from ringctx.parallel.comm import SoloGroup
from ringctx.parallel.mesh import context_mesh
from tests.tolerances import assert_close

CONFIG = ModelConfig(
    vocab_size=61, dim=24, num_layers=4, num_heads=3, num_kv_heads=1, mlp_dim=40, qk_norm=True
)
# (pattern, letters that rotate, decay style)
MODELS = [
    ("S", "SW", "alibi"),
    ("W", "SW", "alibi"),
    *(("LLLS", letters, style) for letters in ("SW", "SWL") for style in get_args(DecayStyle)),
    ("LW", "SWL", "data"),
    ("LW", "", "alibi"),
    ("L", "SW", "data"),
]
PIECES = (5, 1, 0, 1, 30, 7, 1, 1, 1, 16)


def build(mixers: str, letters: str, style: Any) -> Transformer:
    used: dict[str, Any] = {"mixers": mixers, "rope_mixers": letters}
    if "W" in mixers:
        used |= {"window": 9, "sinks": 2}
    if "L" in mixers:
        used["decay_style"] = style
    if mixers == "L":
        used |= {"num_kv_heads": None, "qk_norm": False}
    config = replace(CONFIG, **used)
    model = Transformer(config, dtype=torch.float64).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initialise(name, parameter.shape, config=config, seed=3))
    return model


def whole(model: Transformer, tokens: Tensor, rope_theta: float | None = None) -> Tensor:
    return model.hidden(
        tokens,
        positions=torch.arange(tokens.shape[1]),
        mesh=context_mesh(SoloGroup()),
        rope_theta=rope_theta,
    )


@pytest.mark.proves("prefill in pieces plus steps equals the whole pass", on="CPU")
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_pieces_and_single_tokens_equal_the_whole_pass(model: tuple[str, str, str]) -> None:
    built = build(*model)
    tokens = torch.randint(0, 61, (2, sum(PIECES)))
    for theta in (None, 50.0):
        cache = Cache(rope_theta=theta)
        parts = [extend(built, piece, cache=cache) for piece in tokens.split(PIECES, dim=1)]
        assert cache.num_tokens == sum(PIECES)
        assert_close(torch.cat(parts, 1), whole(built, tokens, theta))


def test_each_kind_of_layer_keeps_what_it_needs_and_no_more() -> None:
    model = build("LWS", "SW", "alibi")
    cache = Cache()
    for piece in torch.randint(0, 61, (2, 200)).split(40, dim=1):
        extend(model, piece, cache=cache)
    lightning, window, softmax, again = cache.states
    assert isinstance(lightning, Tensor) and lightning.shape == (2, 3, 8, 8)
    assert lightning.shape == again.shape
    assert isinstance(window, KeyCache) and window.k.shape == (2, 9 - 1 + 2, 1, 8)
    assert isinstance(softmax, KeyCache) and softmax.k.shape == (2, 200, 1, 8)


@pytest.mark.parametrize("mixers", ["LLLS", "LW"])
def test_writing_takes_the_likeliest_token_of_the_whole_pass_each_time(mixers: str) -> None:
    model, prompt = build(mixers, "SW", "data"), torch.randint(0, 61, (2, 17))
    written = generate(model, prompt, num_tokens=12, piece_len=5)
    text = prompt
    for _ in range(12):
        logits = model.logits(whole(model, text)[:, -1:])
        text = torch.cat((text, logits.argmax(-1)), 1)
    assert torch.equal(written, text[:, 17:])


def test_writing_goes_on_from_a_cache() -> None:
    model, prompt = build("LLLS", "SW", "alibi"), torch.randint(0, 61, (1, 9))
    cache = Cache()
    first = generate(model, prompt, num_tokens=4, cache=cache)
    assert cache.num_tokens == 9 + 3
    second = generate(model, first[:, -1:], num_tokens=3, cache=cache)
    at_once = generate(model, prompt, num_tokens=7)
    assert torch.equal(torch.cat((first, second), 1), at_once)
    assert generate(model, prompt, num_tokens=0).shape == (1, 0)


def test_what_cannot_be_read_in_pieces_is_told_and_the_cache_stays_as_it_was() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor, rows: Rows) -> Tensor:
            return 2 * x

    model = Transformer(CONFIG, make_mixer=lambda config, layer: Doubling())
    cache = Cache()
    with pytest.raises(ConfigError, match=r"Doubling has no method extend\(x, \*, state, rotary"):
        extend(model, torch.zeros(1, 3, dtype=torch.int64), cache=cache)
    assert (cache.num_tokens, cache.states) == (0, ())
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), num_tokens=1)
