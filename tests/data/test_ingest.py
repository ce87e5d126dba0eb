"""Files in, a dataset out: the same from every machine, and nothing broken gets in quietly."""

import gzip
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ringctx.data.tasks
from ringctx.data.documents import Dataset, open_dataset
from ringctx.data.ingest import BuildReport, SourceCount, build_dataset
from ringctx.data.tokenizers import load_tokenizer
from ringctx.errors import ConfigError, DatasetError
from tests.data.samples import write_ranks

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
]


def write(folder: Path, **files: bytes | str) -> Path:
    """Files of a folder `in`; two underscores in a name stand for a point."""
    (folder / "in").mkdir(exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / "in" / name.replace("__", ".")).write_bytes(raw)
    return folder / "in"


def build(folder: Path, **options: Any) -> tuple[BuildReport, list[str]]:
    """Build the folder `in`; the report, and the texts of the dataset's documents."""
    report = build_dataset([folder / "in"], folder / "out", **options)
    dataset = open_dataset(folder / "out")
    tokenizer = load_tokenizer(options.get("tokenizer", "bytes"))
    documents = [dataset.document(i) for i in range(dataset.num_documents)]
    assert all(document[-1] == dataset.end_id for document in documents)
    return report, [tokenizer.decode(document) for document in documents]


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_texts_lines_and_gzipped_files_become_documents(tmp_path: Path) -> None:
    records = [{"text": "first line"}, {"id": 3, "text": "zweite Zeile: äöü"}]
    write(
        tmp_path,
        a__jsonl=jsonl(*records) + "\n  \n",
        b__jsonl__gz=gzip.compress(jsonl({"text": "in gzip"}).encode()),
        c__txt="plain",
        d__txt__gz=gzip.compress(b"plain in gzip"),
    )
    report, texts = build(tmp_path)
    assert sorted(texts) == sorted(
        ["first line", "zweite Zeile: äöü", "in gzip", "plain", "plain in gzip"]
    )
    assert (report.documents, report.texts) == (5, 5)
    assert report.longest == len("zweite Zeile: äöü".encode()) + 1


def test_the_files_of_a_group_are_joined_by_newlines(tmp_path: Path) -> None:
    write(tmp_path, b__txt="two", a__txt="one")
    assert build(tmp_path, group_by="dir")[1] == ["one\ntwo"]


def test_a_rank_file_encodes_and_its_name_and_hash_are_kept(tmp_path: Path) -> None:
    write(tmp_path, a__txt="the thing in the end")
    spec = f"{write_ranks(tmp_path / 'r.tiktoken')}:258"
    _, texts = build(tmp_path, tokenizer=spec)
    assert texts == ["the thing in the end"]
    manifest = open_dataset(tmp_path / "out").manifest
    assert (manifest.tokenizer, manifest.vocab_size, manifest.end_id) == (spec, 259, 258)
    assert manifest.tokenizer_hash == load_tokenizer(spec).hash


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_builds_are_equal_byte_by_byte_whatever_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"text": f"line {i} " * (i % 50)} for i in range(1000)]
    chats = [{"messages": [*TALK, {"role": "assistant", "content": str(i)}]} for i in range(500)]
    folder = write(tmp_path, lines__jsonl=jsonl(*lines, *chats))
    for i in range(40):
        write(tmp_path, **{f"{i}__txt": f"file {i}\n" * i * 10})
    monkeypatch.setattr(ringctx.data.tasks, "TASK_BYTES", 2000)
    reports = [
        build_dataset([f"x={folder}"], tmp_path / f"out-{workers}", workers=workers)
        for workers in (1, 2)
    ]
    build_dataset([f"x={folder}"], tmp_path / "again")
    assert reports[0] == reports[1]
    assert contents(tmp_path / "out-1") == contents(tmp_path / "out-2")
    assert contents(tmp_path / "out-1") == contents(tmp_path / "again")


def test_the_size_of_tasks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"text": "x" * i} for i in range(2, 100)]
    folder = write(tmp_path, a__jsonl=jsonl(*lines), b__txt="b" * 500, c__txt="c" * 7)
    build_dataset([folder], tmp_path / "large")
    monkeypatch.setattr(ringctx.data.tasks, "TASK_BYTES", 100)
    build_dataset([folder], tmp_path / "small")
    assert contents(tmp_path / "large") == contents(tmp_path / "small")


def test_empty_and_one_token_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    write(tmp_path, a__txt="", b__txt="x", c__txt="xy", d__jsonl=jsonl({"text": ""}))
    report, texts = build(tmp_path)
    assert texts == ["xy"]
    assert report.skipped == {"empty": 2, "one token": 1}
    assert open_dataset(tmp_path / "out").manifest.built_from["skipped"] == report.skipped


BAD_TEXTS = {"bad UTF-8": b"caf\xe9", "a NUL": b"\x7fELF\0\0", "half a character": b"\xc3"}


@pytest.mark.parametrize("bad", BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_a_few_undecodable_files_are_left_out_and_listed(tmp_path: Path, bad: bytes) -> None:
    folder = write(tmp_path, bad__txt=bad, **{f"{i}__txt": f"text {i}" for i in range(99)})
    report, texts = build(tmp_path)
    assert len(texts) == 99
    assert report.undecodable == [str(folder / "bad.txt")]
    manifest = open_dataset(tmp_path / "out").manifest
    assert manifest.built_from["undecodable"] == report.undecodable


def test_undecodable_lines_are_listed_with_their_numbers(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {i}"}).encode() for i in range(198)]
    lines[49:49] = [b'{"text": "caf\xe9"}', b'{"text": "half a pair: \\ud800"}']
    folder = write(tmp_path, a__jsonl=b"\n".join(lines))
    report, texts = build(tmp_path)
    assert len(texts) == 198
    assert report.undecodable == [f"{folder / 'a.jsonl'}:{n}" for n in (50, 51)]


def test_more_than_one_percent_of_undecodable_texts_stop_the_build(tmp_path: Path) -> None:
    write(tmp_path, bad__bin=b"\0", **{f"{i}__txt": "text" for i in range(98)})
    with pytest.raises(DatasetError, match=r"1 of 99 texts are not UTF-8(.|\n)*bad\.bin") as error:
        build(tmp_path)
    assert "--glob" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a\.jsonl:3: not valid JSON"),
        ("[" * 100_000, r"a\.jsonl:3: not valid JSON"),
        ("9" * 5_000, r"a\.jsonl:3: not valid JSON"),
        ('{"body": "x"}', r'a\.jsonl:3: expected an object with exactly one of "text", .* body'),
        ('{"text": 5}', r'a\.jsonl:3: "text" must be a string, found 5'),
        ('{"text": null}', r'a\.jsonl:3: "text" must be a string, found null'),
        ("{}", r"a\.jsonl:3: expected .* the keys none"),
        ('["x"]', r"a\.jsonl:3: expected .* found a list"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_line_is_named_and_nothing_is_left(
    tmp_path: Path, line: str, message: str, workers: int
) -> None:
    write(tmp_path, a__jsonl=jsonl({"text": "one"}, {"text": "two"}) + line + "\n")
    with pytest.raises(DatasetError, match=message):
        build(tmp_path, workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["a__txt__gz", "a__jsonl__gz"])
@pytest.mark.parametrize("damage", ["cut", "rubbish"])
def test_a_broken_gzip_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    whole = gzip.compress(b'{"text": "some text"}\n' * 1000)
    write(tmp_path, **{name: whole[:-20] if damage == "cut" else b"no gzip"})
    with pytest.raises(DatasetError, match=r"a\.(txt|jsonl)\.gz.* cannot be read"):
        build(tmp_path)


def test_inputs_without_any_document_are_refused(tmp_path: Path) -> None:
    write(tmp_path, a__txt="", b__txt="x")
    with pytest.raises(DatasetError, match=r"no document is left of 2 texts \(1 empty, 1 one tok"):
        build(tmp_path)


def test_named_inputs_are_sources_in_dataset_and_report(tmp_path: Path) -> None:
    folder = write(tmp_path, a__txt="one", b__txt="three", c__jsonl=jsonl({"text": "ab"}) * 3)
    report = build_dataset(
        [f"{name}={folder / file}" for name, file in (("x", "a.txt"), ("y", "c.jsonl"))]
        + [f"x={folder / 'b.txt'}"],
        tmp_path / "out",
    )
    dataset = open_dataset(tmp_path / "out")
    assert dataset.source_names == ("x", "y")
    assert dataset.sources is not None and dataset.sources.tolist() == [0, 1, 1, 1, 0]
    assert report.sources == {"x": SourceCount(2, 4 + 6), "y": SourceCount(3, 9)}


def test_sources_stay_with_their_documents_when_others_are_skipped(tmp_path: Path) -> None:
    folder = write(tmp_path, a__txt="", b__txt="bb", c__txt="c", d__txt="dd")
    names = [f"{path.stem}={path}" for path in sorted(folder.iterdir())]
    report = build_dataset(names, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.sources is not None and dataset.sources.tolist() == [1, 3]
    assert {name: count.documents for name, count in report.sources.items()} == {
        "a": 0,
        "b": 1,
        "c": 0,
        "d": 1,
    }


def test_inputs_without_names_give_a_dataset_without_sources(tmp_path: Path) -> None:
    write(tmp_path, a__txt="some text")
    report, _ = build(tmp_path)
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.source_names, dataset.sources, report.sources) == ((), None, {})


def targets(dataset: Dataset, index: int) -> str:
    """The text of a document's targets; a stroke is its end."""
    tokens = dataset.document(index)
    zero = np.zeros(1, np.int64)
    bits = dataset.read_loss(np.array([index]), zero, np.array([len(tokens)]))
    return "".join("|" if token == 256 else chr(token) for token in tokens[bits])


def test_marked_spans_are_targets_and_the_end_is_what_the_last_span_is(tmp_path: Path) -> None:
    spans = [{"text": "ask ", "target": False}, {"text": "tell", "target": True}]
    write(
        tmp_path,
        a__jsonl=jsonl({"spans": spans}, {"spans": spans[::-1]}, {"text": "all"}),
        b__txt="file",
    )
    report, texts = build(tmp_path)
    assert texts == ["ask tell", "tellask ", "all", "file"]
    dataset = open_dataset(tmp_path / "out")
    assert [targets(dataset, i) for i in range(4)] == ["tell|", "tell", "all|", "file|"]
    # Without the first token of a document, which nothing predicts.
    assert report.targets == 5 + 3 + 3 + 4


def test_what_target_roles_say_is_a_target_with_what_follows_it(tmp_path: Path) -> None:
    write(tmp_path, a__jsonl=jsonl({"messages": TALK}))
    _, texts = build(tmp_path)
    assert texts == [
        "<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n"
    ]
    assert targets(open_dataset(tmp_path / "out"), 0) == "yo<|im_end|>\n"


def test_template_and_target_roles_can_be_chosen(tmp_path: Path) -> None:
    marked = [{**TALK[0], "target": True}, {**TALK[1], "target": False}, TALK[2]]
    write(tmp_path, a__jsonl=jsonl({"messages": TALK}, {"messages": marked}))
    _, texts = build(tmp_path, message_template="{role}: {content};", target_roles=["user"])
    assert texts == ["user: hi;assistant: yo;user: bye;"] * 2
    dataset = open_dataset(tmp_path / "out")
    assert [targets(dataset, i) for i in (0, 1)] == ["hi;bye;|"] * 2
    assert dataset.manifest.built_from["target_roles"] == ["user"]


@pytest.mark.parametrize("workers", [1, 2])
def test_borders_of_targets_are_borders_of_tokens(tmp_path: Path, workers: int) -> None:
    spans = [{"text": "t", "target": False}, {"text": "he", "target": True}]
    write(tmp_path, a__jsonl=jsonl({"spans": spans}))
    spec = str(write_ranks(tmp_path / "r.tiktoken"))
    build(tmp_path, tokenizer=spec, workers=workers)
    # "the" and "th" are tokens, but none may cross.
    document = open_dataset(tmp_path / "out").document(0)
    assert document.tolist() == [ord("t"), ord("h"), ord("e"), 260]


def test_a_build_without_any_target_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a__jsonl=jsonl({"messages": TALK}))
    with pytest.raises(
        DatasetError, match=r"none of 97 tokens is a target: .* --target-roles model"
    ):
        build(tmp_path, target_roles=["model"])
    assert not (tmp_path / "out").exists()


def test_rejects_a_template_without_content_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path, a__jsonl="broken")
    with pytest.raises(ConfigError, match=r"--message-template '\{role\}' must hold \{content\}"):
        build(tmp_path, message_template="{role}")


def test_undecodable_spans_are_listed_and_left_out(tmp_path: Path) -> None:
    bad = {"spans": [{"text": "x\0", "target": True}]}
    folder = write(tmp_path, a__jsonl=jsonl(*[{"text": "ok"}] * 120, bad))
    report, texts = build(tmp_path)
    assert len(texts) == 120 and report.undecodable == [f"{folder / 'a.jsonl'}:121"]


def test_the_bar_shows_bytes_documents_and_tokens_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    write(tmp_path, a__txt="some text")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    build(tmp_path, progress=True)
    last = terminal.getvalue().split("\r")[-1]
    assert re.search(r"100%.* 9\.00/9\.00 .*B/s, 1 documents, \d+\.\d Mtok/s", last), last


def test_an_existing_output_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path, a__jsonl="broken")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="never overwrites"):
        build(tmp_path)


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    write(tmp_path, a__txt="text")
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"building .*out failed: "):
        build_dataset([tmp_path / "in"], tmp_path / "file" / "out")


def test_rejects_no_workers(tmp_path: Path) -> None:
    write(tmp_path, a__txt="text")
    with pytest.raises(ConfigError, match="--workers 0 must be at least 1"):
        build(tmp_path, workers=0)
