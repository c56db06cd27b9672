"""Pictures that a run draws of the same captions at each validation."""

from dataclasses import dataclass, field

from megatron_jam.config.errors import UsageError
from megatron_jam.config.generation import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class SheetConfig:
    """What is drawn; nothing without captions."""

    captions: list[str] = field(default_factory=list)
    """One picture each, always with the same random numbers, so that sheets differ by the weights
    alone."""

    image_tokenizer: str = ""
    """Folder of the image tokenizer that the pictures were encoded with."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How codes are drawn."""

    def __post_init__(self) -> None:
        if self.captions and not self.image_tokenizer:
            raise UsageError("sheet.captions need sheet.image_tokenizer to become pictures")
