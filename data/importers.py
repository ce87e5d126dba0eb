"""Make a dataset of token files that are there already, without copying a token.

Every file becomes a shard whose `.bin` is a symbolic link to it; offsets and manifest are written
by the same route as a build, so a dataset is whole or not there. The files stay what they are, and
must stay where they are: a dataset whose file is gone or changed does not open.
Price: one reading pass, files in parallel on all cores, about 1 GB/s a core (the content hash).
"""

import logging
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from ringctx.data.import_sources import Format, find_token_files
from ringctx.data.manifest import hash_json, token_dtype
from ringctx.data.megatron_files import open_megatron
from ringctx.data.olmo_files import open_olmo
from ringctx.data.token_files import ScannedFile, TokenDtype, TokenFile, scan_file
from ringctx.data.tokenizers import load_tokenizer
from ringctx.data.writer import DatasetWriter
from ringctx.errors import ConfigError, DatasetError

__all__ = ["ImportReport", "import_dataset"]

logger = logging.getLogger(__name__)


@dataclass
class ImportReport:
    """What an import found."""

    format: Format
    end_id: int
    files: int = 0
    documents: int = 0
    tokens: int = 0
    longest: int = 0
    """Tokens of the longest document."""
    empty: int = 0
    """Documents without tokens, which are left out."""
    one_token: int = 0
    """Documents of one token, which stay (tokens are not moved) and have no target."""
    unended: int = 0
    """Documents that do not end with the end-of-document id."""
    warnings: list[str] = field(default_factory=list)

    def count(self, file: ScannedFile) -> None:
        """Add a file."""
        self.files += 1
        self.documents += len(file.borders) - 1
        self.tokens += int(file.borders[-1])
        self.longest = max(self.longest, int((file.borders[1:] - file.borders[:-1]).max()))
        self.empty += file.empty
        self.one_token += file.one_token
        self.unended += file.unended
        self.warnings += file.warnings


@dataclass(frozen=True)
class _Vocabulary:
    """What a manifest says of the ids."""

    name: str
    hash: str
    vocab_size: int
    end_id: int


def import_dataset(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    format: Format | None = None,
    dtype: TokenDtype | None = None,
    end_id: int | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    progress: bool = False,
) -> ImportReport:
    """Make the dataset `out` of links to token files.

    Args:
        sources: OLMo `.npy` files, Megatron `.bin` files (or the name before `.bin`), and folders,
            which are searched; one shard a file, in this order.
        out: dataset folder to make; must not exist.
        format: `olmo` or `megatron`; None: as the names say.
        dtype: how OLMo files store ids; None: the smallest type that holds the vocabulary.
        end_id: the end-of-document id; None: that of the tokenizer.
        tokenizer: see `load_tokenizer`; this or vocab_size.
        vocab_size: number of ids where the tokenizer is none that can be loaded.
        progress: show a bar on standard error if that is a terminal.

    Returns:
        What was found.

    Raises:
        ConfigError: for options that cannot work; DatasetError: for files that cannot be read.
    """
    vocabulary = _vocabulary(tokenizer, vocab_size, end_id)
    chosen, paths = find_token_files(sources, format=format)
    files = _open(paths, chosen, vocabulary, dtype)
    report = ImportReport(chosen, vocabulary.end_id)
    try:
        with (
            DatasetWriter(out, tokenizer=vocabulary, dtype=files[0].dtype) as writer,
            closing(_scan(files, vocabulary, show=progress)) as scanned,
        ):
            for file in scanned:
                report.count(file)
                writer.link(file.path, offsets=file.borders, tokens_hash=file.tokens_hash)
            skipped = {"empty": report.empty} if report.empty else {}
            names = [str(path) for path in paths]
            writer.finish(built_from={"format": chosen, "inputs": names, "skipped": skipped})
    except OSError as error:
        raise DatasetError(f"importing {out} failed: {error}") from error
    for warning in report.warnings:
        logger.warning(warning)
    return report


def _vocabulary(tokenizer: str | None, vocab_size: int | None, end_id: int | None) -> _Vocabulary:
    if (tokenizer is None) == (vocab_size is None):
        given = "neither" if tokenizer is None else f"both '{tokenizer}' and {vocab_size}"
        raise ConfigError(
            f"one of --tokenizer and --vocab-size must say which ids there are; given: {given}"
        )
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        name, hashed, vocab_size = loaded.name, loaded.hash, loaded.vocab_size
        end_id = loaded.end_id if end_id is None else end_id
    else:
        # Datasets of unknown tokenizers go together if their sizes agree: nothing else is known.
        name, hashed = "unknown", hash_json("unknown")
    assert vocab_size is not None
    if not 1 <= vocab_size <= 2**32:
        raise ConfigError(f"--vocab-size {vocab_size} must lie between 1 and 2^32")
    if end_id is None:
        raise ConfigError(
            "--end-id is needed beside --vocab-size: the id that ends a document (also that of "
            "files which never use it)"
        )
    if not 0 <= end_id < vocab_size:
        raise ConfigError(f"--end-id {end_id} is no id of a vocabulary of {vocab_size:,}")
    return _Vocabulary(name, hashed, vocab_size, end_id)


def _open(
    paths: Sequence[Path], format: Format, vocabulary: _Vocabulary, dtype: TokenDtype | None
) -> list[TokenFile]:
    """Look at all files before any is read, and hold them to one token type."""
    smallest: TokenDtype = (
        "uint16" if token_dtype(vocabulary.vocab_size).itemsize == 2 else "uint32"
    )
    if dtype not in (None, *get_args(TokenDtype)):
        raise ConfigError(f"--dtype {dtype!r} is none of {', '.join(get_args(TokenDtype))}")
    if format == "megatron":
        if dtype is not None:
            raise ConfigError(
                f"--dtype {dtype} is for OLMo files only: a Megatron .idx names its type itself"
            )
        files = [open_megatron(path) for path in paths]
    else:
        files = [open_olmo(path, dtype=dtype or smallest) for path in paths]
    for file in files:
        if file.dtype != files[0].dtype:
            raise DatasetError(
                f"{file.path} holds {file.dtype}, but {files[0].path} holds {files[0].dtype}; a "
                "dataset has one token type: import them into datasets of their own"
            )
    if files[0].dtype == "uint16" and smallest == "uint32":
        raise ConfigError(
            f"{files[0].path} is read as uint16, which cannot hold all ids of a vocabulary of "
            f"{vocabulary.vocab_size:,}; give the --tokenizer or --vocab-size it was made with"
        )
    return files


def _scan(
    files: Sequence[TokenFile], vocabulary: _Vocabulary, *, show: bool
) -> Generator[ScannedFile]:
    """Read all files, several at once; results come in the order of the files."""
    total = sum(file.path.stat().st_size for file in files)
    # Threads are enough: hashing and comparing let go of the interpreter's lock.
    workers = min(len(files), os.cpu_count() or 1)
    with (
        # disable=None: no bar where standard error is not a terminal.
        tqdm(total=total, unit="B", unit_scale=True, disable=None if show else True) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        scan = partial(
            scan_file,
            vocab_size=vocabulary.vocab_size,
            end_id=vocabulary.end_id,
            on_bytes=_locked_update(bar),
        )
        try:
            yield from pool.map(scan, files)
        finally:
            pool.shutdown(cancel_futures=True)


def _locked_update(bar: "tqdm[None]") -> Callable[[int], None]:
    def update(size: int) -> None:
        with bar.get_lock():
            bar.update(size)

    return update
