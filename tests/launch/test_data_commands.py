"""`ringctx data`: what a person types, and what they read."""

import argparse
import json
from pathlib import Path

import pytest

from ringctx.data.documents import open_dataset
from ringctx.errors import ConfigError, DatasetError
from ringctx.launch.data_commands import add_data_commands


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, words)])
    status: int = args.run(args)
    return status


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text("word " * 100 * (i + 1))
    (folder / "empty.txt").write_text("")
    return folder


@pytest.fixture
def dataset(texts: Path, tmp_path: Path) -> Path:
    assert run("build", texts, "--out", tmp_path / "set") == 0
    return tmp_path / "set"


def test_build_sums_up_what_it_wrote_and_what_comes_next(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "set"
    assert run("build", texts, "--out", dataset) == 0
    out = capsys.readouterr().out
    assert "documents  8 (the longest has 4,001 tokens)" in out
    assert f"tokens     {open_dataset(dataset).num_tokens:,}" in out
    assert "skipped    1 empty" in out
    assert f"next: ringctx data stats {dataset}" in out


def test_build_takes_its_options(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--glob", "[0-3].txt", "--group-by", "dir", "--workers", 1, "--tokenizer", "bytes"]
    assert run("build", texts, texts / "7.txt", "--out", out, *options) == 0
    assert open_dataset(out).num_documents == 2


def test_stats_as_json_have_the_promised_keys(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("stats", dataset, "--json") == 0
    stats = json.loads(capsys.readouterr().out)
    assert {
        "documents",
        "tokens",
        "kept_tokens",
        "dropped_tokens",
        "buckets",
        "mean_sequence_len",
        "mean_context_len",
    } <= set(stats)
    assert max(map(int, stats["buckets"])) == 2048
    assert sum(int(k) * n for k, n in stats["buckets"].items()) == stats["kept_tokens"]


def test_stats_take_lengths_with_units(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("stats", dataset, "--min-len", "512", "--max-len", "1k", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["buckets"]) == {"512", "1024"}
    with pytest.raises(ConfigError, match="powers of two"):
        run("stats", dataset, "--max-len", "1000")
    with pytest.raises(ConfigError, match="not a size"):
        run("stats", dataset, "--min-len", "many")


def test_stats_for_people_show_a_line_a_bucket(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run("stats", dataset) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "documents            8 (the longest has 4,001 tokens)"
    assert [line.split()[0] for line in lines[-4:]] == ["256", "512", "1,024", "2,048"]


def test_check_tells_sound_from_broken(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", dataset) == 0
    assert "is sound" in capsys.readouterr().out
    tokens = dataset / "shard-00000.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert run("check", dataset) == 1
    assert "shard-00000.bin holds" in capsys.readouterr().out


def test_mistakes_reach_the_caller_as_errors(dataset: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never overwrites"):
        run("build", texts, "--out", dataset)
    with pytest.raises(ConfigError, match="matches --glob"):
        run("build", texts, "--out", tmp_path / "new", "--glob", "*.rst")
    with pytest.raises(DatasetError, match="does not exist"):
        run("stats", tmp_path / "nowhere")
