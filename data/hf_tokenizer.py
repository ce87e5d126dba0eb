"""Hugging Face `tokenizer.json`: text in, the library's own ids out, and nothing added.

What the file says about truncation, padding and special tokens is for prompts, not for corpora: it
is switched off, and a special token that is spelled out in a text is encoded as the text it is.
Price: 0.6 M tokens a second on one core (byte-level BPE), a tenth of tiktoken; the extra `hf`.
Source: github.com/huggingface/tokenizers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringctx.data.manifest import new_hash
from ringctx.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["HfTokenizer", "load_hf_tokenizer"]

FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"


class HfTokenizer:
    """A tokenizer of the `tokenizers` library; `load_hf_tokenizer` makes one."""

    def __init__(
        self, name: str, inner: "tokenizers.Tokenizer", *, end_token: str, content_hash: str
    ) -> None:
        """Take a tokenizer for texts; its settings for prompts are switched off.

        Args:
            name: what `load_tokenizer` was given.
            inner: the library's tokenizer.
            end_token: the token that ends a document; the vocabulary must have it.
            content_hash: hex name of the file.
        """
        inner.no_truncation()
        inner.no_padding()
        self.name = name
        self.hash = content_hash
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        end_id = inner.token_to_id(end_token)
        assert end_id is not None, end_token
        self.end_id = end_id
        self._end_token = end_token
        self._inner = inner

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of a text.

        Args:
            text: what to encode.
            special: whether special tokens, the end token too, that are spelled out in the text are
                meant; otherwise they are text, and the end-of-document id does not come up.

        Raises:
            DatasetError: if the tokenizer uses the end-of-document id for text of another kind.
        """
        self._inner.encode_special_tokens = not special
        ids = self._encode(text)
        if special or self.end_id not in ids:
            return ids
        # The vocabulary holds the end token as a piece of text: encode that in two pieces.
        head, *others = text.split(self._end_token)
        first, rest = self._end_token[:1], self._end_token[1:]
        pieces = [head]
        for part in others:
            pieces[-1] += first
            pieces.append(rest + part)
        ids = np.concatenate([self._encode(piece) for piece in pieces])
        if self.end_id in ids:
            raise DatasetError(
                f"tokenizer '{self.name}' gives its end-of-document token {self._end_token!r} for "
                "text that it does not know; choose another with --end-token"
            )
        return ids

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of ids; end-of-document ids vanish, broken UTF-8 becomes the replacement sign."""
        kept = [i for i in map(int, ids) if i != self.end_id]
        return self._inner.decode(kept, skip_special_tokens=False)

    def _encode(self, text: str) -> NDArray[np.unsignedinteger[Any]]:
        # The batch call leaves out offsets, which costs half of the time.
        (encoding,) = self._inner.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32)


def load_hf_tokenizer(spec: str, path: Path, *, end_token: str | None) -> HfTokenizer:
    """Read a tokenizer file.

    Args:
        spec: what the user named, kept as the tokenizer's name.
        path: a `tokenizer.json`, or a folder that holds one.
        end_token: text of the token that ends documents; None takes the `eos_token` of the
            `tokenizer_config.json` beside the file.

    Raises:
        ConfigError: if the library is missing, or there is no such end token.
        DatasetError: if a file is broken.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"tokenizer '{spec}': folder {path} holds no {FILE_NAME}")
    library = _library(spec)
    content = file.read_bytes()
    try:
        inner = library.Tokenizer.from_buffer(content)
    # The library raises plain exceptions.
    except Exception as error:
        raise DatasetError(f"{file} is not a tokenizer of Hugging Face: {error}") from error
    end_token = end_token or _configured_end_token(spec, file)
    if inner.token_to_id(end_token) is None:
        raise ConfigError(
            f"tokenizer '{spec}' has no token {end_token!r} to end documents with; name one that "
            f"it has with --end-token{_suggestion(inner)}"
        )
    digest = new_hash()
    digest.update(content)
    return HfTokenizer(spec, inner, end_token=end_token, content_hash=digest.hexdigest())


def _library(spec: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f"tokenizer '{spec}' needs the library 'tokenizers': pip install 'ringctx[hf]'"
        ) from error
    return tokenizers


def _configured_end_token(spec: str, file: Path) -> str:
    """The `eos_token` beside a tokenizer file: a string, or an object with its content."""
    path = file.with_name(CONFIG_NAME)
    token: Any = None
    if path.is_file():
        try:
            config = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path} is not valid JSON: {error}") from error
        token = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        raise ConfigError(
            f"tokenizer '{spec}' does not say which token ends a document: put {CONFIG_NAME} with "
            f"its eos_token beside {file}, or name the token with --end-token"
        )
    return token


def _suggestion(inner: "tokenizers.Tokenizer") -> str:
    special = [t.content for t in inner.get_added_tokens_decoder().values() if t.special]
    return f" (its special tokens are {', '.join(special[:10])})" if special else ""
