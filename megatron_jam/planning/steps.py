"""A part of a model as steps: what each keeps for its backward pass, and what that pass allocates.

The sum of what they keep is what a micro-batch holds between the passes; going through the steps
backwards gives the most that is held at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FP32 = 4
"""Bytes of a number in fp32."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a micro-batch is to one rank."""

    tokens: int
    """Tokens of a micro-batch, before sequence parallelism splits them."""

    width: int
    """Bytes of a number: 4 in fp32, 2 in bf16."""

    tensor: int = 1
    """Tensor-parallel ranks."""

    sequence: bool = False
    """Whether they split norms and residuals by sequence position."""

    main_gradients: bool = True
    """Whether tables add their gradients to the sums of Megatron's wrapper."""

    @property
    def is_low(self) -> bool:
        """Whether numbers are narrower than fp32."""
        return self.width < FP32

    def states(self, size: int) -> int:
        """Bytes of [S, B, size] as norms and residuals hold it."""
        return self.whole(size) // (self.tensor if self.sequence else 1)

    def whole(self, size: int) -> int:
        """Bytes of [S, B, size] of all positions."""
        return self.tokens * size * self.width

    def split(self, size: int, width: int | None = None) -> int:
        """Bytes of [S, B, size] whose last dimension tensor parallelism splits."""
        return self.tokens * size * (width or self.width) // self.tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """One differentiable operation; sizes in bytes."""

    keeps: dict[str, int]
    """Tensors that stay until its backward has run; one name is one tensor for all steps."""

    gradient: int = 0
    """What its backward makes for the step in front; 0 where it is added to the residual's."""

    weight: int = 0
    """Numbers of its weight on this rank."""

    works: int = 0
    """What its backward holds besides."""


def kept(steps: Sequence[Step]) -> int:
    """Bytes of all tensors that `steps` keep."""
    return _kept_so_far(steps)[-1]


def _kept_so_far(steps: Sequence[Step]) -> list[int]:
    """Bytes of all tensors that the first 0, 1, 2, ... of `steps` keep."""
    tensors: dict[str, int] = {}
    sums = [0]
    for step in steps:
        sums.append(
            sums[-1] + sum(size - tensors.get(each, 0) for each, size in step.keeps.items())
        )
        tensors |= step.keeps
    return sums


def backward_peak(steps: Sequence[Step], sizes: Sizes) -> int:
    """Most bytes held at once while the backward pass goes through `steps`, what they keep
    included."""
    so_far = _kept_so_far(steps)
    most, gradient = so_far[-1], 0
    # To an fp32 sum of gradients torch adds a bf16 one through an fp32 copy.
    copy = FP32 if sizes.is_low else 0
    for number in reversed(range(len(steps))):
        step = steps[number]
        made = step.gradient + step.weight * sizes.width
        most = max(most, so_far[number + 1] + gradient + made + step.works)
        most = max(most, so_far[number] + made + step.weight * copy)
        gradient = step.gradient
    return most
