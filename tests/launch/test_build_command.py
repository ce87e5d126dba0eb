"""`ringctx data build` with sources, messages, a tokenizer.json: what one types and reads."""

import argparse
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from ringctx.data.documents import open_dataset
from ringctx.errors import ConfigError
from ringctx.launch.data_commands import add_data_commands


def build(*words: object) -> None:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", "build", *map(str, words)])
    assert args.run(args) == 0


def test_sources_and_targets_are_summed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spans = [{"text": "ask", "target": False}, {"text": "tell", "target": True}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"spans": spans}) + "\n")
    (tmp_path / "a.txt").write_text("text")
    build(f"chat={tmp_path / 'chat.jsonl'}", f"prose={tmp_path / 'a.txt'}", "--out", tmp_path / "o")
    out = capsys.readouterr().out
    assert "targets    9 (69.2%)" in out
    assert "source chat: 1 documents, 8 tokens" in out
    assert "source prose: 1 documents, 5 tokens" in out


def test_a_build_of_plain_text_says_nothing_of_sources_and_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    build(tmp_path / "a.txt", "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "targets" not in out and "source" not in out


def test_template_and_roles_are_taken_and_a_written_newline_is_one(tmp_path: Path) -> None:
    message = {"role": "bot", "content": "hey"}
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [message]}) + "\n")
    options = ["--message-template", r"{role}:{content}\n", "--target-roles", "user,bot"]
    build(tmp_path / "a.jsonl", "--out", tmp_path / "out", *options)
    document = open_dataset(tmp_path / "out").document(0)
    assert bytes(document[:-1].astype("u1")) == b"bot:hey\n"


def test_the_end_token_can_be_named(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a b": 0, "c": 1, "</s>": 2}, unk_token="c"))
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        json.dumps({"spans": [{"text": text, "target": True} for text in ("a b", "c")]}) + "\n"
    )
    options = ["--tokenizer", tmp_path, "--out", tmp_path / "out"]
    with pytest.raises(ConfigError, match="or name the token with --end-token"):
        build(tmp_path / "in", *options)
    build(tmp_path / "in", *options, "--end-token", "</s>")
    assert open_dataset(tmp_path / "out").document(0).tolist() == [0, 1, 2]
