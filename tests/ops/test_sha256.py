"""Digests of several messages at once are those of one after the other."""

import hashlib

import numpy as np
import pytest

from megatron_jam.ops import sha256
from megatron_jam.ops.extension import sha256_update
from megatron_jam.ops.sha256 import ALONE, LANES, Sha256, best_alone

SIZES = [
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
]


@pytest.mark.parametrize("places", [[0], [3, ALONE], [*range(7)], [*range(LANES), ALONE]], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_hashlib(places: list[int], sizes: list[int]) -> None:
    """Also sizes at which the end takes one block more, and pieces that end within a block.

    Twice in the same places; what a compiler makes of the lanes needs no wide vectors.
    """
    generator, digest = np.random.default_rng(sum(sizes)), Sha256()
    for _ in range(2):
        due = {place: hashlib.sha256() for place in places}
        for size in sizes:
            pieces = {place: generator.bytes(size) for place in places}
            digest.update({place: memoryview(piece) for place, piece in pieces.items()})
            for place, piece in pieces.items():
                due[place].update(piece)
        assert {p: digest.hexdigest(p) for p in places} == {p: due[p].hexdigest() for p in places}


def test_messages_of_unlike_sizes_begin_and_end_by_themselves() -> None:
    """Each step gives some messages a piece, and ends some, where others begin."""
    generator, digest = np.random.default_rng(0), Sha256()
    due = {place: hashlib.sha256() for place in range(LANES + 1)}
    ended = 0
    for _ in range(60):
        pieces = {
            place: generator.bytes(int(generator.choice([1, 60, 64, 640, 4096, 5000])))
            for place in due
            if generator.random() < 0.7
        }
        digest.update({place: memoryview(piece) for place, piece in pieces.items()})
        for place, piece in pieces.items():
            due[place].update(piece)
        for place in due:
            if generator.random() < 0.1:
                assert digest.hexdigest(place) == due[place].hexdigest()
                due[place] = hashlib.sha256()
                ended += 1
    assert ended > 50


@pytest.mark.parametrize(
    ("sizes", "alone"),
    [
        ([], 0),
        ([100], 1),
        ([100] * 6, 6),
        ([100] * 8, 0),  # 7 lanes' time for 8 messages
        ([100] * 64, 0),
        ([1000, 1000] + [100] * 32, 2),
        ([200, 200] + [100] * 64, 0),  # they end before the others
    ],
)
def test_the_long_and_the_few_are_hashed_alone(
    sizes: list[int], alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sha256, "has_sha_lanes", lambda: True)
    assert best_alone(sizes) == alone
    monkeypatch.setattr(sha256, "has_sha_lanes", lambda: False)
    assert best_alone(sizes) == len(sizes)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b"x" * 64] * 17, "over 16"),
        ([None, b"x" * 64, b"x" * 63], "no multiple of 64"),
        ([memoryview(b"x" * 256)[::2]], "plain bytes"),
    ],
)
def test_refuses_what_would_be_read_beyond_its_end(pieces: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sha256_update(np.zeros((8, 16), dtype=np.uint32), pieces)
    with pytest.raises(ValueError, match="states are not"):
        sha256_update(np.zeros((8, 15), dtype=np.uint32), [b"x" * 64])
