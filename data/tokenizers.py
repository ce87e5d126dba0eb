"""Text to ids and back: `bytes`, a tiktoken-style file of ranks, or a `tokenizer.json`.

For bytes and ranks the end-of-document id comes right after the tokenizer's own ids, so the first n
ranks of a file are a whole, smaller tokenizer: ranks are merge order.
Price: bytes cost nothing; tiktoken encodes about 5 M tokens a second on one core.
Source: github.com/openai/tiktoken (engine, file format, and the pattern of cl100k_base).
"""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
from numpy.typing import NDArray

from ringctx.data.hf_tokenizer import load_hf_tokenizer
from ringctx.data.manifest import hash_json, new_hash
from ringctx.data.vocabulary import Vocabulary
from ringctx.errors import ConfigError, DatasetError

__all__ = ["ByteTokenizer", "RankTokenizer", "Tokenizer", "load_tokenizer", "name_end_token"]

# How text is split before merging, whatever the rank file: words with their leading space, digits
# by three, punctuation, white space. It is part of the tokenizer's hash.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)

_NUM_BYTES = 256


class Tokenizer(Vocabulary, Protocol):
    """What a build needs of a tokenizer."""

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of a text, without the end-of-document id.

        With `special`, special tokens that are spelled out in the text are meant; without it they
        are text like any other.
        """

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of ids; end-of-document ids vanish, broken UTF-8 becomes the replacement sign."""


class ByteTokenizer:
    """UTF-8 bytes are the ids; 256 ends a document."""

    name = "bytes"
    vocab_size = _NUM_BYTES + 1
    end_id = _NUM_BYTES

    @property
    def hash(self) -> str:
        """Hex name of the mapping."""
        return hash_json("utf-8 bytes")

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of a text; there are no special tokens that it could spell out."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of ids; end-of-document ids vanish, broken UTF-8 becomes the replacement sign."""
        return bytes(i for i in map(int, ids) if i != self.end_id).decode(errors="replace")


class RankTokenizer:
    """Byte-pair merges by rank, run by tiktoken."""

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        """Take ranks 0..n-1; n becomes the end-of-document id."""
        self.name = name
        self.end_id = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.hash = _hash_ranks(ranks)
        self._encoding = tiktoken.Encoding(
            name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of a text; there are no special tokens that it could spell out."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # The pattern backtracks once a character over a run of white space, and gives up
            # beyond some hundred thousand.
            if len(text) < 2:
                raise
            middle = len(text) // 2
            return np.concatenate([self.encode(text[:middle]), self.encode(text[middle:])])

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of ids; end-of-document ids vanish, broken UTF-8 becomes the replacement sign."""
        return self._encoding.decode([i for i in map(int, ids) if i != self.end_id])


def load_tokenizer(spec: str) -> Tokenizer:
    """Make the tokenizer that a text names.

    Args:
        spec: `bytes`; or the path of a rank file (on each line a base64 token and its rank), or
            `path:n` for its first n ranks; or the path of a `tokenizer.json` or of the folder that
            holds it, or `path:token` to name the token that ends a document.

    Raises:
        ConfigError: if the name is not known, n does not fit the file, the end token is not known,
            or a library is missing.
        DatasetError: if the file is broken, naming the line.
    """
    if spec == ByteTokenizer.name:
        return ByteTokenizer()
    path, option = _split(spec)
    if path.is_dir() or path.suffix == ".json":
        return load_hf_tokenizer(spec, path, end_token=option)
    ranks = _read_ranks(path)
    if option is not None:
        count = int(option) if option.isascii() and option.isdecimal() else -1
        if not _NUM_BYTES <= count <= len(ranks):
            raise ConfigError(
                f"tokenizer '{spec}': {path} holds {len(ranks):,} ranks, so n must lie between "
                f"{_NUM_BYTES} and {len(ranks):,}"
            )
        ranks = {token: rank for token, rank in ranks.items() if rank < count}
    _check_bytes(path, ranks)
    return RankTokenizer(spec, ranks)


def name_end_token(spec: str, end_token: str | None) -> str:
    """The name of a tokenizer with the token that ends a document.

    Raises:
        ConfigError: if its end token cannot be chosen.
    """
    if end_token is None:
        return spec
    path, option = (None, None) if spec == ByteTokenizer.name else _split(spec)
    if option is not None:
        raise ConfigError(f"--end-token {end_token!r}: tokenizer '{spec}' names {option!r} already")
    if path is None or not (path.is_dir() or path.suffix == ".json"):
        raise ConfigError(
            f"--end-token {end_token!r}: tokenizer '{spec}' has an end-of-document id of its own; "
            "only a tokenizer.json lets you choose"
        )
    return f"{spec}:{end_token}"


def _split(spec: str) -> tuple[Path, str | None]:
    """The path of a tokenizer, and what follows a colon after it; a path that exists wins."""
    if Path(spec).exists():
        return Path(spec), None
    for at in (at for at, sign in enumerate(spec) if sign == ":" and at):
        if Path(spec[:at]).exists():
            return Path(spec[:at]), spec[at + 1 :]
    raise ConfigError(
        f"tokenizer '{spec}' is neither 'bytes' nor a rank file nor a tokenizer.json or a folder "
        "with one; a rank file may be followed by ':n' for its first n ranks, a tokenizer.json by "
        "':token' for the token that ends a document"
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DatasetError(
                f"{path}:{number}: expected a base64 token and its rank, got {line[:40]!r}"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DatasetError(
            f"{path}: its {len(ranks):,} different tokens do not have the ranks 0 to "
            f"{len(ranks) - 1:,}, each once; the file is cut or mixed up"
        )
    return ranks


def _check_bytes(path: Path, ranks: dict[bytes, int]) -> None:
    missing = [byte for byte in range(_NUM_BYTES) if bytes([byte]) not in ranks]
    if missing:
        raise DatasetError(
            f"{path}: {len(missing)} of the 256 single bytes have no rank (the first is "
            f"{missing[0]:#04x}), so some text could not be encoded; use a complete file"
        )


def _hash_ranks(ranks: dict[bytes, int]) -> str:
    digest = new_hash()
    digest.update(PATTERN.encode())
    for token in sorted(ranks, key=ranks.__getitem__):
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()
