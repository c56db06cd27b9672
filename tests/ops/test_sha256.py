"""Digests of several messages at once are those of one after the other."""

import hashlib

import numpy as np
import pytest

from megatron_jam.ops import sha256
from megatron_jam.ops.extension import has_sha_lanes, sha256_update
from megatron_jam.ops.sha256 import LANES, Sha256


@pytest.fixture(params=["lanes", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either way, on every processor: what a compiler makes of the lanes needs no wide vectors."""
    monkeypatch.setattr(sha256, "_pays", lambda count: request.param == "lanes")
    return request.param


@pytest.mark.parametrize("count", [1, 7, LANES])
@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [1],
        [55],
        [56],
        [63],
        [64],
        [65],
        [64, 128],
        [640, 3],
        [100, 28, 1],
        [1 << 20, 4096],
    ],
    ids=str,
)
def test_equals_hashlib(way: str, count: int, sizes: list[int]) -> None:
    """Also sizes at which the end takes one block more, and pieces that end within a block."""
    generator = np.random.default_rng(sum(sizes))
    digest, due = Sha256(count), [hashlib.sha256() for _ in range(count)]
    for size in sizes:
        pieces = [generator.bytes(size) for _ in range(count)]
        digest.update([memoryview(piece) for piece in pieces])
        for each, piece in zip(due, pieces, strict=True):
            each.update(piece)
    for _ in range(2):  # asking changes nothing
        assert digest.hexdigests() == [each.hexdigest() for each in due]


def test_lanes_are_for_many() -> None:
    assert not sha256._pays(1)
    assert sha256._pays(LANES) == has_sha_lanes()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "not 1 to 16"),
        ([b"x" * 64] * 17, "not 1 to 16"),
        ([b"x" * 64, b"x" * 128], "of one size"),
        ([b"x" * 63], "no multiple of 64"),
    ],
)
def test_refuses_what_would_be_read_beyond_its_end(pieces: list[bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sha256_update(np.zeros((8, 16), dtype=np.uint32), pieces)
    with pytest.raises(ValueError, match="states are not"):
        sha256_update(np.zeros((8, 15), dtype=np.uint32), [b"x" * 64])
