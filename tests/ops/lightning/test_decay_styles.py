"""The decays that models are trained with: their formulas, at their edges."""

import math

import pytest
import torch

from ringctx.errors import LayoutError
from ringctx.ops.lightning.decay_styles import log_decay

STYLES = ["alibi", "retnet", "tnl", "none"]


def test_alibi_slopes_of_eight_heads_are_those_of_the_paper() -> None:
    expected = torch.tensor([-(0.5**n) for n in range(1, 9)])
    torch.testing.assert_close(log_decay(8, style="alibi"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("heads", [1, 3, 7, 12, 40])
def test_alibi_slopes_are_one_geometric_row_for_any_number_of_heads(heads: int) -> None:
    slopes = log_decay(heads, style="alibi").double()
    assert slopes[-1] == -(2.0**-8)
    ratios = slopes[1:] / slopes[:-1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 2 ** (-8 / heads)))


def test_retnet_decays_are_one_minus_a_power_of_two() -> None:
    kept = log_decay(4, style="retnet").double().exp()
    torch.testing.assert_close(
        kept, torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256]).double()
    )
    # So near to 1 that fp32 cannot hold it, but its log can.
    assert log_decay(40, style="retnet")[-1].item() == pytest.approx(-(2.0**-44))


def test_tnl_forgets_less_in_every_layer_and_hardly_in_the_last() -> None:
    alibi = log_decay(6, style="alibi")
    layers = [log_decay(6, style="tnl", layer=layer, num_layers=5) for layer in range(5)]
    factors = torch.stack(layers) / alibi
    expected = torch.tensor([1.00001, 0.75001, 0.50001, 0.25001, 0.00001])
    torch.testing.assert_close(factors, expected[:, None].expand(5, 6), rtol=1e-5, atol=1e-9)


def test_tnl_of_a_single_layer_is_that_of_a_first_layer() -> None:
    single = log_decay(3, style="tnl")
    first = log_decay(3, style="tnl", layer=0, num_layers=9)
    torch.testing.assert_close(single, first, rtol=0, atol=0)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("heads", [1, 5, 16])
def test_every_style_gives_fp32_log_decays_that_are_not_positive(style: str, heads: int) -> None:
    for layer in range(3):
        decay = log_decay(heads, style=style, layer=layer, num_layers=3)
        assert decay.shape == (heads,)
        assert decay.dtype == torch.float32
        assert (decay <= 0).all()
        assert decay.isfinite().all()


def test_none_forgets_nothing() -> None:
    assert math.copysign(1, log_decay(2, style="none")[0].item()) == 1
    assert (log_decay(2, style="none") == 0).all()


def test_unknown_styles_and_layers_are_refused() -> None:
    with pytest.raises(LayoutError, match="'alibbi' is unknown; known are alibi, retnet, tnl"):
        log_decay(4, style="alibbi")
    with pytest.raises(LayoutError, match="num_heads=0 must be at least 1"):
        log_decay(0, style="alibi")
    for layer in (-1, 4):
        with pytest.raises(LayoutError, match=f"layer={layer} must be between 0 and .* 3"):
            log_decay(4, style="tnl", layer=layer, num_layers=4)
