"""Cut the documents of a build into tasks of a few megabytes, in order.

Files of text are read by the worker that gets them; lines of JSONL are read here, for where they
lie in a file is not known before.
"""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringctx.data.sources import LineSource, TextSource
from ringctx.errors import DatasetError

__all__ = ["LineTask", "TextTask", "split_tasks"]

TASK_BYTES = 4 * 2**20


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
    source: int = 0


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
            yield from _split_lines(source)
    if waiting:
        yield TextTask(tuple(waiting), size)


def _split_lines(source: LineSource) -> Iterator[LineTask]:
    """Cut a JSONL file into tasks; bytes are counted as they lie on disk."""
    file = source.file
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
                    yield LineTask(file, number, tuple(lines), at - counted, source.source)
                    number, counted = number + len(lines), at
                    lines, size = [], 0
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{file}:{number + len(lines)}: cannot be read: {error}") from error
    if lines:
        rest = file.stat().st_size - counted
        yield LineTask(file, number, tuple(lines), rest, source.source)
