"""`ringctx data import`: what a person types, and what they read."""

import argparse
from pathlib import Path

import pytest

from ringctx.data.documents import open_dataset
from ringctx.errors import ConfigError, DatasetError
from ringctx.launch.data_commands import add_data_commands
from tests.data.foreign_files import END, write_megatron, write_olmo


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", "import", *map(str, words)])
    status: int = args.run(args)
    return status


def test_import_sums_up_what_it_found_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_olmo(tmp_path / "a.npy", [[1, 2, 3, END], [], [END], [4, 5]], index=True)
    write_olmo(tmp_path / "b.npy", [[6, END]])
    out = tmp_path / "set"
    assert run(tmp_path, "--out", out, "--tokenizer", "bytes") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {out}",
        "  files      2 of olmo, linked, not copied: leave them there",
        "  documents  4 (the longest has 4 tokens)",
        "  tokens     9",
        "  skipped    1 empty",
        "  no target  1 documents of one token, kept in place",
        "  open end   1 documents do not end with id 256",
        f"next: ringctx data stats {out}",
    ]


def test_import_takes_its_options(tmp_path: Path) -> None:
    file = write_olmo(tmp_path / "tokens", [[1, 2, 9], [3, 9]], dtype="uint32")
    options = ["--format", "olmo", "--dtype", "uint32", "--end-id", 9, "--vocab-size", 300]
    assert run(file, "--out", tmp_path / "set", *options) == 0
    dataset = open_dataset(tmp_path / "set")
    assert (dataset.lengths.tolist(), dataset.end_id, dataset.vocab_size) == ([3, 2], 9, 300)
    assert dataset.manifest.dtype == "uint32"


def test_import_says_nothing_of_what_did_not_happen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_megatron(tmp_path / "a.bin", [[[1], [2, END]]])
    assert run(tmp_path / "a", "--out", tmp_path / "set", "--tokenizer", "bytes") == 0
    out = capsys.readouterr().out
    assert "1 of megatron" in out
    assert "skipped    nothing" in out
    assert "no target" not in out and "open end" not in out


def test_a_vocabulary_is_named_in_one_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_olmo(tmp_path / "a.npy", [[1, END]])
    for options in ([], ["--tokenizer", "bytes", "--vocab-size", 300]):
        with pytest.raises(SystemExit):
            run(file, "--out", tmp_path / "set", *options)
        assert "--vocab-size" in capsys.readouterr().err


def test_mistakes_reach_the_caller_as_errors(tmp_path: Path) -> None:
    file = write_olmo(tmp_path / "a.npy", [[1, 2]])
    with pytest.raises(DatasetError, match="is nowhere in its 2 tokens"):
        run(file, "--out", tmp_path / "set", "--tokenizer", "bytes")
    with pytest.raises(ConfigError, match="does not exist"):
        run(tmp_path / "b.npy", "--out", tmp_path / "set", "--tokenizer", "bytes")
