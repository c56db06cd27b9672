"""How tokens are drawn when a model writes."""

from dataclasses import dataclass

from megatron_jam.config.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of mixed-modal decoding; the defaults for pictures are the paper's."""

    guidance_scale: float = 3.5
    """Alpha of classifier-free guidance in pictures (paper eq. 6). 1 is no guidance, and halves the
    work."""

    temperature: float = 1.0
    """Temperature of picture codes; 0 takes the likeliest."""

    top_p: float = 0.9
    """Nucleus of picture codes: the share of probability from which they are drawn."""

    text_temperature: float = 1.0
    """Temperature of text, `<break>` and `</s>`; 0 takes the likeliest."""

    text_top_p: float = 0.9
    """Nucleus of text, `<break>` and `</s>`."""

    max_new_tokens: int = 1024
    """Tokens after which a document ends, pictures' included; a picture that has begun is always
    finished."""

    seed: int = 0
    """Every draw is a function of (seed, index of the prompt, position)."""

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` naming a wrong setting."""
        if not 0 <= self.guidance_scale <= 100:
            raise UsageError(
                f"sampling.guidance_scale must be within 0..100, not {self.guidance_scale}"
            )
        for name in ("temperature", "text_temperature"):
            if not 0 <= getattr(self, name) <= 100:
                raise UsageError(
                    f"sampling.{name} must be within 0..100, not {getattr(self, name)}"
                )
        for name in ("top_p", "text_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(
                    f"sampling.{name} must be above 0 and at most 1, not {getattr(self, name)}"
                )
        if self.max_new_tokens < 1:
            raise UsageError(
                f"sampling.max_new_tokens must be at least 1, not {self.max_new_tokens}"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"sampling.seed must be a 64-bit integer, not {self.seed}")
