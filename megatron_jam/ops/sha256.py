"""SHA-256 of several messages at once, where the processor has vectors for it."""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from megatron_jam.ops.extension import has_sha_lanes, sha256_update

LANES = 16
"""Messages that are hashed at once."""
ALONE = LANES
"""The place of one that is hashed by itself, by the instructions for one, beside those."""
FEWEST = 7
"""Messages with which the lanes are faster than those instructions, one after the other."""
BLOCK = 64
"""Bytes that are hashed at once."""

_START = (
    0x6A09E667,
    0xBB67AE85,
    0x3C6EF372,
    0xA54FF53A,
    0x510E527F,
    0x9B05688C,
    0x1F83D9AB,
    0x5BE0CD19,
)


class Sha256:
    """Digests of messages that grow side by side: in places 0 .. LANES - 1, and one ALONE."""

    def __init__(self) -> None:
        """Begin an empty message in every place."""
        self._states = np.repeat(np.array(_START, dtype=np.uint32)[:, None], LANES, axis=1)
        self._sizes, self._rests = [0] * LANES, [b""] * LANES
        self._alone = hashlib.sha256()

    def update(self, pieces: Mapping[int, memoryview]) -> None:
        """Add bytes to messages, by place; best about as many to each."""
        whole: list[memoryview | None] = [None] * LANES
        for place, given in pieces.items():
            if place == ALONE:
                self._alone.update(given)
                continue
            self._sizes[place] += len(given)
            rest = self._rests[place]
            piece = memoryview(rest + bytes(given)) if rest else given
            end = len(piece) // BLOCK * BLOCK
            whole[place], self._rests[place] = piece[:end], bytes(piece[end:])
        sha256_update(self._states, whole)

    def hexdigest(self, place: int) -> str:
        """Of the message in `place`, where an empty one begins."""
        if place == ALONE:
            found, self._alone = self._alone.hexdigest(), hashlib.sha256()
            return found
        rest = self._rests[place]
        zeros = bytes(-(len(rest) + 9) % BLOCK)
        end = rest + b"\x80" + zeros + struct.pack(">Q", 8 * self._sizes[place])
        sha256_update(self._states, [end if lane == place else None for lane in range(LANES)])
        digest = self._states[:, place].astype(">u4").tobytes().hex()
        self._states[:, place] = _START
        self._sizes[place], self._rests[place] = 0, b""
        return digest


def best_alone(sizes: Sequence[int]) -> int:
    """How many of the longest messages are better hashed alone, and the others in lanes.

    Args:
        sizes: of the messages in bytes, the longest first.
    """
    if not sizes or not has_sha_lanes():
        return len(sizes)
    # Lanes work until the longest message in them ends; all of them as long as FEWEST alone.
    before = list(accumulate(sizes, initial=0))
    costs = [
        alone + FEWEST * max(longest, (before[-1] - alone) / LANES)
        for alone, longest in zip(before, [*sizes, 0], strict=True)
    ]
    return costs.index(min(costs))
