"""Turn texts into tokens: the part of a build that runs in worker processes.

A task is a few megabytes of input; its result holds the tokens of its documents one after another,
each ended by the end-of-document id, and counts what was skipped and why.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringctx.data.manifest import token_dtype
from ringctx.data.sources import LineSource, TextSource
from ringctx.data.tokenizers import Tokenizer, load_tokenizer
from ringctx.errors import DatasetError

__all__ = ["Encoded", "LineTask", "TextTask", "encode_in_worker", "encode_task", "split_tasks"]

TASK_BYTES = 4 * 2**20

_worker_tokenizers: dict[str, Tokenizer] = {}


@dataclass(frozen=True)
class TextTask:
    """Whole documents, to be read by the worker."""

    documents: tuple[TextSource, ...]
    input_bytes: int


@dataclass(frozen=True)
class LineTask:
    """Lines of a JSONL file."""

    file: Path
    first_line: int
    """Number of the first line, from 1."""
    lines: tuple[bytes, ...]
    input_bytes: int


@dataclass
class Encoded:
    """What became of a task."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    input_bytes: int
    texts: int = 0
    """Files and lines that were read."""
    empty: int = 0
    one_token: int = 0
    undecodable: list[str] = field(default_factory=list)
    """Files and `file:line` that are not UTF-8 text."""


class _Undecodable(Exception):
    """The bytes are not UTF-8 text."""


def split_tasks(sources: Sequence[TextSource | LineSource]) -> Iterator[TextTask | LineTask]:
    """Cut sources into tasks of about 4 MiB, in order; a document is never cut."""
    waiting: list[TextSource] = []
    size = 0
    for source in sources:
        if isinstance(source, TextSource):
            waiting.append(source)
            size += sum(file.stat().st_size for file in source.files)
        if waiting and (isinstance(source, LineSource) or size >= TASK_BYTES):
            yield TextTask(tuple(waiting), size)
            waiting, size = [], 0
        if isinstance(source, LineSource):
            yield from _split_lines(source.file)
    if waiting:
        yield TextTask(tuple(waiting), size)


def encode_in_worker(task: TextTask | LineTask, tokenizer: str) -> Encoded:
    """`encode_task` with a tokenizer that each process loads once."""
    if tokenizer not in _worker_tokenizers:
        # The build has a process a core already; the library of tokenizer.json would start threads.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _worker_tokenizers[tokenizer] = load_tokenizer(tokenizer)
    return encode_task(task, _worker_tokenizers[tokenizer])


def encode_task(task: TextTask | LineTask, tokenizer: Tokenizer) -> Encoded:
    """Read and encode all documents of a task.

    Raises:
        DatasetError: naming the file, and the line, that cannot be read.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    done = Encoded(np.empty(0, dtype), np.empty(0, np.int64), task.input_bytes)
    texts = _read_lines(task, done) if isinstance(task, LineTask) else _read_files(task, done)
    documents: list[NDArray[Any]] = []
    for text in texts:
        ids = tokenizer.encode(text)
        if len(ids) > 1:
            documents.append(np.append(ids.astype(dtype), dtype.type(tokenizer.end_id)))
        elif len(ids):
            done.one_token += 1
        else:
            done.empty += 1
    if documents:
        done.tokens = np.concatenate(documents)
        done.lengths = np.array([len(document) for document in documents], dtype=np.int64)
    return done


def _read_files(task: TextTask, done: Encoded) -> Iterator[str]:
    """The texts of a task's documents; files that are no text are left out and listed."""
    for document in task.documents:
        parts = []
        for file in document.files:
            done.texts += 1
            try:
                parts.append(_decode(_read(file)))
            except _Undecodable:
                done.undecodable.append(str(file))
        if parts:
            yield "\n".join(parts)


def _read_lines(task: LineTask, done: Encoded) -> Iterator[str]:
    """The texts of a task's lines; blank lines are no documents."""
    for number, line in enumerate(task.lines, start=task.first_line):
        if not line.strip():
            continue
        done.texts += 1
        place = f"{task.file}:{number}"
        try:
            text = _text_of(_parse(_decode(line), place), place)
            _decode(text.encode())
        except (_Undecodable, UnicodeEncodeError):
            done.undecodable.append(place)
        else:
            yield text


def _parse(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        # Nested too deeply, or a number of thousands of digits, is not broken but as useless.
        raise DatasetError(f"{place}: not valid JSON: {error}") from error


def _text_of(record: Any, place: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if isinstance(text, str):
        return text
    if isinstance(record, dict):
        held = f"an object with the keys {', '.join(record) or 'none'}"
    else:
        held = f"a {type(record).__name__}"
    raise DatasetError(f'{place}: expected an object with a string under "text", found {held}')


def _decode(raw: bytes) -> str:
    if b"\0" in raw:
        raise _Undecodable
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _Undecodable from error


def _read(file: Path) -> bytes:
    try:
        raw = file.read_bytes()
        return gzip.decompress(raw) if file.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{file} cannot be read: {error}") from error


def _split_lines(file: Path) -> Iterator[LineTask]:
    """Cut a JSONL file into tasks; bytes are counted as they lie on disk."""
    lines: list[bytes] = []
    number, size, counted = 1, 0, 0
    try:
        with file.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
            for line in stream:
                lines.append(line)
                size += len(line)
                if size >= TASK_BYTES:
                    at = raw.tell()
                    yield LineTask(file, number, tuple(lines), at - counted)
                    number, counted = number + len(lines), at
                    lines, size = [], 0
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{file}:{number + len(lines)}: cannot be read: {error}") from error
    if lines:
        yield LineTask(file, number, tuple(lines), file.stat().st_size - counted)
