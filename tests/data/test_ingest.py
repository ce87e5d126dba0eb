"""Files in, a dataset out: the same from every machine, and nothing broken gets in quietly."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import ringctx.data.encode
from ringctx.data.documents import open_dataset
from ringctx.data.ingest import BuildReport, build_dataset
from ringctx.data.tokenizers import load_tokenizer
from ringctx.errors import ConfigError, DatasetError
from tests.data.samples import write_ranks


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
    lines = [{"text": f"line {i} " * (i % 50)} for i in range(2000)]
    folder = write(tmp_path, lines__jsonl=jsonl(*lines))
    for i in range(40):
        write(tmp_path, **{f"{i}__txt": f"file {i}\n" * i * 10})
    monkeypatch.setattr(ringctx.data.encode, "TASK_BYTES", 2000)
    reports = [
        build_dataset([folder], tmp_path / f"out-{workers}", workers=workers) for workers in (1, 2)
    ]
    build_dataset([folder], tmp_path / "again")
    assert reports[0] == reports[1]
    assert contents(tmp_path / "out-1") == contents(tmp_path / "out-2")
    assert contents(tmp_path / "out-1") == contents(tmp_path / "again")


def test_the_size_of_tasks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"text": "x" * i} for i in range(2, 100)]
    folder = write(tmp_path, a__jsonl=jsonl(*lines), b__txt="b" * 500, c__txt="c" * 7)
    build_dataset([folder], tmp_path / "large")
    monkeypatch.setattr(ringctx.data.encode, "TASK_BYTES", 100)
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
        ('{"body": "x"}', r'a\.jsonl:3: expected an object with a string under "text", .* body'),
        ('{"text": 5}', r"a\.jsonl:3: expected an object with a string"),
        ('{"text": null}', r"a\.jsonl:3: expected"),
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
