"""SHA-256 of several messages at once, where the processor has vectors for it."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

from megatron_jam.ops.extension import has_sha_lanes, sha256_update

LANES = 16
"""Messages that are hashed at once."""
FEWEST = 7
"""Messages with which that is faster than one after the other, by the instructions for one."""
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
    """Digests of messages that come in equal pieces."""

    def __init__(self, count: int) -> None:
        """Begin `count` messages, at most LANES."""
        assert 1 <= count <= LANES
        self._single = [hashlib.sha256() for _ in range(count if not _pays(count) else 0)]
        self._states = np.repeat(np.array(_START, dtype=np.uint32)[:, None], LANES, axis=1)
        self._size = 0
        self._rest: list[bytes] = [b""] * count

    def update(self, pieces: Sequence[memoryview]) -> None:
        """Add a piece of bytes to each message; all of one size, best a multiple of BLOCK."""
        assert len(pieces) == len(self._rest)
        if self._single:
            for single, piece in zip(self._single, pieces, strict=True):
                single.update(piece)
            return
        self._size += len(pieces[0])
        if self._rest[0]:
            joined = zip(self._rest, pieces, strict=True)
            pieces = [memoryview(rest + bytes(piece)) for rest, piece in joined]
        whole = len(pieces[0]) // BLOCK * BLOCK
        if whole:
            sha256_update(self._states, [piece[:whole] for piece in pieces])
        self._rest = [bytes(piece[whole:]) for piece in pieces]

    def hexdigests(self) -> list[str]:
        """Of each message, in order."""
        if self._single:
            return [single.hexdigest() for single in self._single]
        states = self._states.copy()
        zeros = bytes(-(len(self._rest[0]) + 9) % BLOCK)
        end = b"\x80" + zeros + struct.pack(">Q", 8 * self._size)
        sha256_update(states, [rest + end for rest in self._rest])
        return [states[:, lane].astype(">u4").tobytes().hex() for lane in range(len(self._rest))]


def _pays(count: int) -> bool:
    return count >= FEWEST and has_sha_lanes()
