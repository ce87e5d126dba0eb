"""`ringctx data plan` and the picture of `ringctx data stats`."""

import json
from pathlib import Path
from typing import Any

import pytest

from ringctx.launch.cli import main
from tests.tiny import write_config, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    write_config(tmp_path)
    return tmp_path


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["data", "plan", str(folder / "config.yaml"), "--json", *arguments]) == 0
    table: dict[str, Any] = json.loads(capsys.readouterr().out)
    return table


def test_the_json_says_layout_and_share_of_time_of_every_length(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = planned(folder, capsys, "--ranks", "4", "parallel.tokens_per_rank=32")
    assert list(table["buckets"]) == ["16", "32", "64", "128"]
    assert [row["cp_degree"] for row in table["buckets"].values()] == [1, 1, 2, 4]
    assert [row["dp_degree"] for row in table["buckets"].values()] == [4, 4, 2, 1]
    for length, row in table["buckets"].items():
        assert row["tokens"] == row["pieces"] * int(length) == row["steps"] * 256
    shares = [row["predicted_time_share"] for row in table["buckets"].values()]
    assert sum(shares) == pytest.approx(1)
    assert table["run_steps"] == 20


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("curriculum.total_tokens=4k",),
        ("curriculum.total_tokens=64k",),
        ("curriculum={kind: packed, len: 64, packing: best_fit, tokens_per_step: 256}",),
        ("curriculum={kind: packed, len: 64, tokens_per_step: 256, total_tokens: 64k}",),
    ],
)
def test_every_token_of_the_dataset_is_accounted_for(
    folder: Path, capsys: pytest.CaptureFixture[str], changes: tuple[str, ...]
) -> None:
    if changes and changes[0].startswith("curriculum={"):
        text = (folder / "config.yaml").read_text()
        lines = [line for line in text.splitlines() if not line.startswith("curriculum")]
        (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    table = planned(folder, capsys, "train.steps=null", *changes)
    placed = table["tokens"] + table["left_over_tokens"]
    placed -= table["padding_tokens"] + table["repeated_tokens"]
    outside = table["dropped_tokens"] + table["passed_over_tokens"]
    assert placed + outside == table["dataset_tokens"]
    assert (table["repeated_tokens"] > 0) == (changes[-1:] != () and "64k" in changes[-1])


def test_the_more_lightning_layers_the_less_long_rows_take_of_the_time(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ("model.window=null", "model.sinks=0", "model.num_layers=4")
    shares = []
    for mixers in ("S", "LS", "LLLS"):
        buckets = planned(folder, capsys, *plain, f"model.mixers={mixers}")["buckets"]
        shares.append(
            [row["predicted_time_share"] * 1e4 / row["tokens"] for row in buckets.values()]
        )
    for softmax, half, quarter in zip(*shares, strict=True):
        # A token's share, relative to that of the shortest length, comes nearer to 1.
        first = [own[0] for own in shares]
        assert softmax / first[0] >= half / first[1] >= quarter / first[2] >= 1
    lightning = ("model.mixers=L", "model.num_kv_heads=null", "model.qk_norm=false")
    buckets = planned(folder, capsys, *plain, *lightning)["buckets"]
    costs = [row["predicted_time_share"] / row["tokens"] for row in buckets.values()]
    assert costs == pytest.approx([costs[0]] * len(costs))


def test_overrides_may_stand_before_and_behind_options(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = planned(folder, capsys, "curriculum.cycles=1", "--ranks", "2")
    behind = planned(folder, capsys, "--ranks", "2", "curriculum.cycles=1")
    assert before == behind
    with pytest.raises(SystemExit):
        main(["data", "plan", str(folder / "config.yaml"), "--ranks", "2", "--what"])
    assert "unrecognized arguments: --what" in capsys.readouterr().err


def test_the_table_prints_every_length_and_where_tokens_go(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "plan", str(folder / "config.yaml"), "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["16", "32", "64", "128"]
    assert "train.steps ends the run after 20 of them" in text
    assert "in steps" in text and "dropped" in text and "% of the dataset" in text


def test_stats_draw_a_png_and_refuse_other_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, picture = str(folder / "dataset"), folder / "lengths.png"
    assert main(["data", "stats", data, "--min-len", "16", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["data", "stats", data, "--plot", str(folder / "lengths.pdf")]) == 2
    assert "must be the name of a .png file" in capsys.readouterr().err
