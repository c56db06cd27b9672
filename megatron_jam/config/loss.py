"""What each predicted token counts in training."""

import math
from dataclasses import dataclass

from megatron_jam.config.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Options of the training loss. Those that are reported are never weighted."""

    z: float = 0.0
    """Weight of (log Z)^2 of each token, Z the softmax's denominator, which keeps logits from
    drifting; 1e-5 is usual where training diverges, the paper has none."""

    text: float = 1.0
    """What a text token counts. All four are 1 in the paper; sums are divided by the number of
    counted tokens, whatever their weights."""

    image: float = 1.0
    """What an image code counts."""

    special: float = 1.0
    """What <break>, </s>, sentinels and <eoss> count."""

    infill: float = 1.0
    """What text tokens and image codes count in spans that CM3 moved."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        for name in ("z", "text", "image", "special", "infill"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"loss.{name} is {getattr(self, name)}; it must be 0 or more")
        if not (self.text or self.image or self.special or self.infill):
            raise UsageError("loss: text, image, special and infill are 0, so that nothing counts")
