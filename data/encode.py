"""Turn texts into tokens: the part of a build that runs in worker processes.

A task is a few megabytes of input; its result holds the tokens of its documents one after another,
each ended by the end-of-document id, with their sources and which tokens are targets, and counts
what was skipped and why.
"""

import gzip
import multiprocessing
import multiprocessing.connection
import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringctx.data.manifest import token_dtype
from ringctx.data.records import MessageFormat, Span, parse_record
from ringctx.data.tasks import LineTask, TextTask
from ringctx.data.tokenizers import Tokenizer, load_tokenizer
from ringctx.errors import DatasetError

__all__ = ["Encoded", "encode_in_worker", "encode_task", "start_worker"]

_worker_tokenizers: dict[str, Tokenizer] = {}


@dataclass
class Encoded:
    """What became of a task."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    sources: NDArray[np.uint16]
    """Of each document."""
    input_bytes: int
    loss: NDArray[np.bool_] | None = None
    """Of each token, whether it is a target; None: all are."""
    texts: int = 0
    """Files and lines that were read."""
    empty: int = 0
    one_token: int = 0
    undecodable: list[str] = field(default_factory=list)
    """Files and `file:line` that are not UTF-8 text."""


@dataclass(frozen=True)
class _Text:
    """A document before it is encoded."""

    spans: list[Span]
    source: int


class _Undecodable(Exception):
    """The bytes are not UTF-8 text."""


def start_worker(folder: str) -> None:
    """Make a new process fit to encode: in the folder of its parent, and gone when that is."""
    os.chdir(folder)
    # The build has a process a core already; the library of tokenizer.json would start threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def encode_in_worker(task: TextTask | LineTask, tokenizer: str, messages: MessageFormat) -> Encoded:
    """`encode_task` with a tokenizer that each process loads once."""
    if tokenizer not in _worker_tokenizers:
        _worker_tokenizers[tokenizer] = load_tokenizer(tokenizer)
    return encode_task(task, _worker_tokenizers[tokenizer], messages)


def encode_task(
    task: TextTask | LineTask, tokenizer: Tokenizer, messages: MessageFormat
) -> Encoded:
    """Read and encode all documents of a task.

    Raises:
        DatasetError: naming the file, and the line, that cannot be read.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    nothing = np.empty(0, np.int64)
    done = Encoded(nothing.astype(dtype), nothing, nothing.astype(np.uint16), task.input_bytes)
    if isinstance(task, LineTask):
        texts = _read_lines(task, done, messages)
    else:
        texts = _read_files(task, done)
    pieces = _Pieces()
    for text in texts:
        ids = [tokenizer.encode(span.text, special=span.special) for span in text.spans]
        counts = [len(part) for part in ids]
        if sum(counts) > 1:
            pieces.add(text, ids, counts, tokenizer.end_id)
        elif sum(counts):
            done.one_token += 1
        else:
            done.empty += 1
    if pieces.lengths:
        pieces.join(done)
    return done


@dataclass
class _Pieces:
    """Spans and ends of documents, to be joined once."""

    ids: list[NDArray[Any]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Tokens of each piece."""
    targets: list[bool] = field(default_factory=list)
    """Whether the tokens of a piece are targets."""
    lengths: list[int] = field(default_factory=list)
    """Of each document, its end included."""
    sources: list[int] = field(default_factory=list)

    def add(self, text: _Text, ids: list[NDArray[Any]], counts: list[int], end_id: int) -> None:
        """Take a document; its end is a target if its last span is."""
        self.ids += [*ids, np.array([end_id])]
        self.counts += [*counts, 1]
        self.targets += [*(span.target for span in text.spans), text.spans[-1].target]
        self.lengths.append(sum(counts) + 1)
        self.sources.append(text.source)

    def join(self, done: Encoded) -> None:
        """Put everything into the result of the task."""
        done.tokens = np.concatenate(self.ids, dtype=done.tokens.dtype, casting="unsafe")
        done.lengths = np.array(self.lengths, dtype=np.int64)
        done.sources = np.array(self.sources, dtype=np.uint16)
        if not all(self.targets):
            done.loss = np.repeat(self.targets, self.counts)


def _exit_after(sentinel: int) -> None:
    """Wait for the death of the parent: its queue never tells, for each worker holds it open."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _read_files(task: TextTask, done: Encoded) -> Iterator[_Text]:
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
            yield _Text([Span("\n".join(parts))], document.source)


def _read_lines(task: LineTask, done: Encoded, messages: MessageFormat) -> Iterator[_Text]:
    """The texts of a task's lines; blank lines are no documents."""
    for number, line in enumerate(task.lines, start=task.first_line):
        if not line.strip():
            continue
        done.texts += 1
        place = f"{task.file}:{number}"
        try:
            spans = parse_record(_decode(line), place, messages)
            for span in spans:
                _decode(span.text.encode())
        except (_Undecodable, UnicodeEncodeError):
            done.undecodable.append(place)
        else:
            yield _Text(spans, task.source)


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
