"""What a dataset says of its token ids: a tokenizer has it, and so has an import without one."""

from typing import Protocol

__all__ = ["Vocabulary"]


class Vocabulary(Protocol):
    """Ids, and the name of what they mean."""

    @property
    def name(self) -> str:
        """For people; what `load_tokenizer` takes, where there is a tokenizer."""

    @property
    def hash(self) -> str:
        """Hex name of the mapping from text to ids."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-document id included."""

    @property
    def end_id(self) -> int:
        """The end-of-document id."""
