"""Parameters and FLOPs are those counted one by one."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ringctx.config import DecayStyle, ModelConfig
from ringctx.data import Step
from ringctx.model import Transformer
from ringctx.model_cost import flops_per_token, parameter_count, step_flops, step_tokens
from tests.data.packed_steps import packed_step

CONFIG = ModelConfig(vocab_size=61, dim=24, num_layers=2, num_heads=3, num_kv_heads=1, mlp_dim=40)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_parameter_count_is_that_of_the_model(tie: bool, qk_norm: bool) -> None:
    config = ModelConfig(
        vocab_size=61, dim=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8,
        tie_embeddings=tie, qk_norm=qk_norm,
    )  # fmt: skip
    model = Transformer(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_flops_are_six_for_each_weight_and_half_the_square_for_attention() -> None:
    embedding = 61 * 24
    norms = CONFIG.num_layers * 2 * 24 + 24
    weights = parameter_count(CONFIG) - embedding - norms
    assert flops_per_token(CONFIG, seq_len=0) == 6 * weights
    # Forward: two products over 513 / 2 keys on average, 2 FLOPs each; backward twice that.
    attention = 3 * 2 * 2 * CONFIG.num_layers * 24 * 513 / 2
    assert flops_per_token(CONFIG, seq_len=512) - 6 * weights == attention


@pytest.mark.parametrize("style", ["alibi", "data"])
@pytest.mark.parametrize("mixers", ["L", "LLLS", "LSW"])
def test_parameter_count_and_matrices_of_a_hybrid_are_those_of_the_model(
    mixers: str, style: DecayStyle
) -> None:
    kv_heads = 6 if mixers == "L" else 2
    config = ModelConfig(
        vocab_size=61, dim=24, num_layers=5, num_heads=6, num_kv_heads=kv_heads, head_dim=8,
        mixers=mixers, decay_style=style, qk_norm=mixers != "L",
        window=9 if "W" in mixers else None,
    )  # fmt: skip
    weights = dict(Transformer(config).named_parameters())
    assert parameter_count(config) == sum(weight.numel() for weight in weights.values())
    matrices = sum(
        weight.numel()
        for name, weight in weights.items()
        if weight.ndim > 1 and "embed" not in name
    )
    layers = sum(config.mixer(layer) == "L" for layer in range(5))
    # A token is written into a state of 8 x 8 in each of 6 heads, and read from it: 2 FLOPs an
    # entry each, and twice that backward.
    states = layers * 3 * (2 + 2) * 6 * 8 * 8
    assert flops_per_token(config, seq_len=0) == 6 * matrices + states


@pytest.mark.parametrize("mixers", ["L", "LLS"])
def test_lightning_layers_cost_a_token_the_same_at_every_length(mixers: str) -> None:
    config = replace(CONFIG, num_layers=3, mixers=mixers, num_kv_heads=3 if mixers == "L" else 1)
    more = flops_per_token(config, seq_len=4096) - flops_per_token(config, seq_len=0)
    assert more == ("S" in mixers) * 12 * 24 * 4097 / 2
    packed = flops_per_token(config, seq_len=50, cu_seqlens=(0, 8, 50))
    assert packed == pytest.approx(
        flops_per_token(config, seq_len=0)
        + ("S" in mixers) * 12 * 24 * (visible(8) + visible(42)) / 50
    )


@pytest.mark.parametrize("borders", [(0, 50), (0, 1, 8, 29, 50)], ids=str)
@pytest.mark.parametrize("sight", [(1, 0), (7, 0), (7, 3), (7, 30), (49, 2), (64, 9)], ids=str)
def test_flops_count_just_the_keys_that_a_layer_sees(
    sight: tuple[int, int], borders: tuple[int, ...]
) -> None:
    window, sinks = sight
    config = replace(CONFIG, num_layers=3, mixers="SW", window=window, sinks=sinks)
    full = sum(visible(length) for length in lengths_of(borders))
    near = sum(visible(length, window, sinks) for length in lengths_of(borders))
    flops = flops_per_token(config, seq_len=50, cu_seqlens=borders)
    matrices = flops_per_token(config, seq_len=0)
    assert flops - matrices == pytest.approx(12 * 24 * (2 * full + near) / 50)


def lengths_of(borders: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in pairwise(borders)]


def visible(length: int, window: int | None = None, sinks: int = 0) -> int:
    """Pairs of a query and a key that it sees, counted one by one."""
    return sum(
        window is None or query - key < window or key < sinks
        for query in range(length)
        for key in range(query + 1)
    )


ROWS = [[(0, 0, 30), (1, 5, 9)], [(2, 0, 1)], [(3, 7, 40)]]
PACKED = {"bucket_len": 40, "lengths": [30, 50, 1, 60]}


def test_a_step_of_single_pieces_costs_its_tokens_times_their_flops() -> None:
    step = Step(0, 50, np.zeros((6, 2), dtype=np.int64), 0)
    assert step_tokens(step) == 300
    assert step_flops(CONFIG, step) == pytest.approx(300 * flops_per_token(CONFIG, seq_len=50))


@pytest.mark.parametrize("window", [None, 4, 12, 35])
@pytest.mark.parametrize("doc_mask", [True, False])
def test_a_packed_step_costs_what_its_tokens_see_and_no_padding(
    doc_mask: bool, window: int | None
) -> None:
    config = replace(CONFIG, num_layers=3, mixers="SW", window=7, sinks=3)
    step = packed_step(ROWS, **PACKED, doc_mask=doc_mask, window=window)  # type: ignore[arg-type]
    seen = [30, 9, 1, 40] if doc_mask else [39, 1, 40]
    far = sum(visible(length, window) for length in seen)
    near = sum(visible(length, min(7, window or 7), 3) for length in seen)
    matrices = flops_per_token(config, seq_len=0)
    assert step_tokens(step) == 80
    expected = 80 * matrices + 12 * 24 * (2 * far + near)
    assert step_flops(config, step) == pytest.approx(expected)
