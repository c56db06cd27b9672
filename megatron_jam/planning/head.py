"""What the head keeps, and the memory that the loss works in (models/head.py, models/loss.py)."""

from dataclasses import dataclass

from megatron_jam.config.model import ModelConfig
from megatron_jam.models.loss import LOGITS_AT_ONCE
from megatron_jam.models.parameters import padded_vocabulary
from megatron_jam.planning.activations import norm
from megatron_jam.planning.steps import FP32, Sizes, Step


def head_steps(model: ModelConfig, sizes: Sizes, names: dict[str, str]) -> list[Step]:
    """Projections and norms from the towers' states, called `names`, to what output rows read."""
    steps: list[Step] = []
    for reader in model.readers:
        width = model.table_width(model.table_of(reader))
        name = f"head {reader}"
        if model.is_pair and model.head == "project":
            joint = {f"{name} joined": sizes.states(model.joint_size)}
            weight = width * model.joint_size
            steps.append(Step(keeps=joint, gradient=sum(joint.values()), weight=weight))
            tower = model.table_tower(model.table_of(reader))
            steps += norm(tower, sizes, name, f"{name} projected", width)
            continue
        own = reader if reader in model.towers else model.tower_names[0]
        narrow = model.towers[own].hidden_size
        steps += norm(model.table_tower(reader), sizes, name, names[own], narrow)
        if narrow != width:
            normed = {f"{name} normed": sizes.states(narrow)}
            steps.append(Step(keeps=normed, gradient=sizes.states(narrow), weight=narrow * width))
    return steps


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Bytes of the output rows' product and the cross-entropy, which are one operation."""

    peak: int
    """At most during the forward pass, its inputs included."""

    hidden: int
    """Gradients of the states that rows read: from the forward to the backward pass."""

    tables: int
    """Gradients of the output rows: as long, or until the embedding's is there if it is tied on the
    same stage; none if they are added to the sums of Megatron's wrapper."""


def loss(model: ModelConfig, sizes: Sizes) -> Loss:
    """Logits exist for some tokens at a time, fp32; gradients are made with them and kept."""
    widths = [model.table_width(model.table_of(reader)) for reader in model.readers]
    rows = padded_vocabulary(model.vocab_size, sizes.tensor) // sizes.tensor
    at_once = min(sizes.tokens, max(1, LOGITS_AT_ONCE // rows))
    states = sizes.tokens * sum(widths)
    tables = rows * sum(model.table_width(table) for table in model.table_names)
    tables = 0 if sizes.main_gradients else tables
    several, again = len(model.readers) > 1, at_once < sizes.tokens

    def logits(tokens: int, copies: int) -> int:
        """Bytes of fp32 logits, and of copies of them in the model's type."""
        return tokens * rows * (FP32 + copies * sizes.width)

    low = int(sizes.is_low)
    # Parts by reader, the parts side by side, and in bf16 their fp32 copy.
    parts = low + int(several)
    # The slopes take the logits' place, in bf16 with a copy, and are there when the next tokens'
    # logits are made.
    slopes = logits(at_once, low)
    rest = min(at_once, sizes.tokens - at_once)
    making = max(logits(at_once, parts), slopes + logits(rest, parts) if again else 0)
    product = 0
    if sizes.is_low:
        # A product in bf16, which is written or, an fp32 copy of it, added to the sum.
        adds = several or again or sizes.main_gradients
        product = rows * max(widths) * (sizes.width + (FP32 if adds else 0))
        of_hidden = at_once * max(widths) * (sizes.width + (FP32 if several else 0))
        product = max(product, of_hidden)
    casting = (states + tables) * sizes.width if sizes.is_low else 0
    exact = (states + tables) * FP32
    return Loss(
        peak=states * sizes.width + exact + max(making, slopes + product, slopes + casting),
        hidden=states * sizes.width,
        tables=tables * sizes.width,
    )
