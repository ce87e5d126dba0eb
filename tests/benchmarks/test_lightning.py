"""The benchmark of lightning attention: what it makes of its times, and a run in seconds."""

import json
from pathlib import Path

import pytest
from lightning import exponent, main, ratios
from lightning_gemms import ChunkProducts, Sizes
from lightning_memory import main as measure_memory
from torch.utils.flop_counter import FlopCounterMode

SIZES = Sizes(tokens=96, heads=2, head_dim=8, chunk_len=16)
TINY = ["--heads", "2", "--head-dim", "8", "--chunk-len", "16", "--threads", "1"]


def test_the_exponent_of_a_straight_line_is_its_slope() -> None:
    assert exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == 2.0
    assert exponent([64], [1.0]) is None


def test_ratios_are_paired_and_not_those_of_medians() -> None:
    found = ratios([(4.0, 1.0), (9.0, 1.0), (6.0, 1.0)], [(2.0, 2.0), (2.0, 2.0), (1.0, 4.0)])
    # 4 / 2, 9 / 2, 6 / 1; the medians would give 6 / 2.
    assert found["wall"] == {"median": 4.5, "min": 2.0, "max": 6.0}
    assert found["cpu"]["median"] == 0.5


@pytest.mark.parametrize("states_again", [False, True])
def test_the_bound_counts_every_product(states_again: bool) -> None:
    products = ChunkProducts(SIZES, group=5)
    with FlopCounterMode(display=False) as counter:
        products.run(states_again=states_again)
    assert counter.get_total_flops() == products.flops(states_again=states_again)


def test_every_length_and_variant_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["ours", "ours_decay_by_token", "sdpa", "products", "products_states_again"]
    assert main(["--quick", "--no-memory", *TINY, "--variants", *names]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["lengths"]) == ["128", "256"]
    for row in result["lengths"].values():
        for clock in ("wall_s", "cpu_s", "tokens_per_s"):
            assert list(row[clock]) == names
        assert "sdpa / ours" in row["ratios"]
        assert "ours / products" in row["ratios"]
    assert list(result["exponents"]) == names
    assert result["config"]["left_out_beyond_tokens"] == {}


def test_memory_is_compared_with_inputs_outputs_and_states(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert measure_memory(["ours", "--tokens", "96", *TINY]) == 0
    result = json.loads(capsys.readouterr().out)
    denominators = result["denominators"]
    assert denominators["inputs_bytes"] == denominators["outputs_bytes"] == 4 * 96 * 2 * 8 * 4
    assert denominators["states_bytes"] == 6 * 2 * 8 * 8 * 4
    assert result["peak_bytes"] >= 0


def test_lengths_need_not_double_and_a_picture_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "time.png"
    lengths = ["--lengths", "96", "48", "--rounds", "1"]
    few = ["--variants", "ours", "sdpa", "products_states_again"]
    assert main([*lengths, "--no-memory", *TINY, *few, "--plot", str(picture)]) == 0
    assert list(json.loads(capsys.readouterr().out)["lengths"]) == ["48", "96"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_length_of_less_than_a_chunk_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--lengths", "8", *TINY])
    assert "less than a chunk" in capsys.readouterr().err
