"""What is done with records, whatever they are."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np

from megatron_jam.data.indexed import Kind, narrowest_dtype
from megatron_jam.data.prepare.held_out import HeldOut
from megatron_jam.data.prepare.pictures import ImageEncoding
from megatron_jam.data.prepare.records import BadRecord, Chunk, Record, Rejected
from megatron_jam.data.prepare.writing import Prepared
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.tokenizers.vocabulary import JointVocabulary

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """Makes documents of records; a copy of it works in each process."""

    kind: ClassVar[Kind]

    tokenizer: TextTokenizer
    vocabulary: JointVocabulary
    images: ImageEncoding | None = None
    """None without pictures."""

    held_out: HeldOut = field(default_factory=HeldOut)

    @property
    def num_records(self) -> int:
        """Records that are worked on together; 0 for any number."""
        return self.images.batch_size if self.images else 0

    @property
    def finishes_in_one_process(self) -> bool:
        """Whether :meth:`finish` is for the process that began, which has the device."""
        return self.images is not None and self.images.device.type != "cpu"

    @property
    def dtype(self) -> np.dtype:
        """Of the set."""
        return narrowest_dtype(self.vocabulary, self.kind)

    @property
    def slices(self) -> Sequence[str]:
        """Names of what is held out."""
        return list(self.held_out.shares)

    def described(self) -> dict[str, Any]:
        """What a set says of how it was made, but its settings."""
        return {
            "tokenizer_sha256": self.tokenizer.sha256,
            "image_tokenizer_sha256": self.images.sha256 if self.images else "",
            "kind": self.kind,
        }

    def settings(self) -> dict[str, Any]:
        """What else the documents depend on, besides the input, as JSON has it."""
        return self.held_out.settings()

    @abstractmethod
    def read(self, chunk: Chunk) -> Any:
        """Parse, decode, tokenize: what any process can do."""

    @abstractmethod
    def finish(self, read: Any) -> Prepared:
        """Encode pictures and lay documents out."""

    def text_ids(self, text: str, where: str) -> list[int]:
        """The text tokenizer's ids of `text`.

        Raises:
            BadRecord: a special id is among them, as <unk> of one that is not byte-level.
        """
        ids = self.tokenizer.encode(text)
        try:
            self.vocabulary.text_id(ids)
        except ValueError as error:
            raise BadRecord(where, str(error)) from error
        return ids


def sift(chunk: Chunk, read: Callable[[Record], T]) -> tuple[list[T], list[Rejected]]:
    """What `read` makes of the chunk's records, and those that it or the reader refused."""
    made, rejected = [], []
    for each in chunk.records():
        try:
            if isinstance(each, BadRecord):
                raise each
            made.append(read(each))
        except BadRecord as error:
            rejected.append(error.rejected)
    return made, rejected
