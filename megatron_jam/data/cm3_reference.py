"""The CM3 objective in numpy: the specification of csrc/include/jam/cm3.h, to the bit.

k spans are moved to the end, so that a left-to-right model learns to fill gaps with both sides in
sight (arXiv 2201.07520; metaseq's code moves spans of packed blocks, and ends each with `<eoss>`):

    a b c d e f g h   ->   a <sentinel:0> d e <sentinel:1> h
                           <sentinel:0> b c <eoss> <sentinel:1> f g <eoss>

- A piece is the block without its trailing padding; in scope `document` each document of the block
  is one, one after the other.
- k is drawn from a Poisson distribution and capped. With k = 0 the piece stays as it is. k is
  lowered only where the piece has fewer tokens that can move.
- The moves add 3k tokens. What does not fit into the room that is left is cut off the piece's end
  *before* spans are drawn, so that no span loses its end. Padding is room.
- The 2k ends are uniform over what is read of the piece; sorted and taken in pairs, they are k
  uniform spans given that no two overlap. Each span is clipped to the segment with which it
  overlaps most (the first of equals); a segment is a run without `<break>`, `</s>` and `<pad>`, in
  scope `authors` without `<break>` and `<pad>` alone. If a span is left empty, all ends are drawn
  again; after 64 times k single tokens are drawn instead (Floyd's algorithm).
- With the chance `mask_whole_caption` a piece's only span is one whole caption instead: a segment
  of text right before `<break>` and a picture, not at the piece's start, where it may be cut.
- In scope `document` the spans of a document that ends with `</s>` stand before that.

The result depends on tokens, documents, settings and a row of uniform numbers in [0, 1) alone; for
each piece in order: one for the caption's chance (and one to choose it, which ends the piece), one
for k, 2k for each draw of the ends (or k single tokens).
"""

import math
from collections.abc import Iterator
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.data import Cm3Config
from megatron_jam.data.sample import Block
from megatron_jam.ops.reference import philox_uniform
from megatron_jam.tokenizers.vocabulary import IMAGE, TEXT, JointVocabulary

Tokens = NDArray[np.integer]
Spans = NDArray[np.int64]
"""[k, 2]: starts and ends (one past the last token), in order, disjoint."""

MAX_DRAWS = 64
_NONE = np.empty((0, 2), dtype=np.int64)


def cm3_uniforms(seed: int, index: int) -> Iterator[float]:
    """The uniform numbers of sample `index`."""
    return (philox_uniform(seed, index, number) for number in count())


def cm3_reference(
    block: Block, vocabulary: JointVocabulary, config: Cm3Config, uniforms: Iterator[float]
) -> Block:
    """`block` with spans moved; documents move with their tokens, sentinels with their spans."""
    size = len(block.tokens)
    content = _content_size(block.tokens, vocabulary)
    documents = block.documents
    made = [(block.tokens[:0], documents[:0])]
    num_read, room = 0, size
    for start, stop in _pieces(documents[:content], config):
        if room <= 0:
            break
        tokens = block.tokens[start:stop]
        spans = _choose_spans(tokens, room, vocabulary, uniforms, config)
        read = slice(start, start + _read_size(len(tokens), room, len(spans)))
        made.append(_move(block.tokens[read], documents[read], spans, vocabulary, config))
        num_read += read.stop - start
        room -= len(made[-1][0])
    padding = int(documents[content - 1]) + 1 if content else 0
    result = Block.of(
        np.concatenate([*(each for each, _ in made), np.full(room, vocabulary.pad)]),
        np.concatenate([*(each for _, each in made), np.full(room, padding)]),
    )
    return result._replace(dropped=content - num_read)


def find_segments(
    tokens: Tokens, vocabulary: JointVocabulary, *, across_documents: bool = False
) -> Spans:
    """The runs of `tokens` without `<break>` and `<pad>` and, unless `across_documents`, `</s>`."""
    borders = [vocabulary.break_, vocabulary.pad] + ([] if across_documents else [vocabulary.eos])
    inside = np.concatenate([[False], ~np.isin(tokens, borders), [False]])
    return np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2)


def _content_size(tokens: Tokens, vocabulary: JointVocabulary) -> int:
    content = np.flatnonzero(tokens != vocabulary.pad)
    return int(content[-1]) + 1 if content.size else 0


def _pieces(documents: NDArray[np.int64], config: Cm3Config) -> list[tuple[int, int]]:
    size = len(documents)
    borders = np.flatnonzero(np.diff(documents)) + 1 if config.scope == "document" else []
    edges = [0, *(int(border) for border in borders), size]
    return list(pairwise(edges)) if size else []


def _read_size(size: int, room: int, num_spans: int) -> int:
    """How many of a piece's tokens are read if `num_spans` of its spans move."""
    return max(0, min(size, room - 3 * num_spans))


def _choose_spans(
    tokens: Tokens,
    room: int,
    vocabulary: JointVocabulary,
    uniforms: Iterator[float],
    config: Cm3Config,
) -> Spans:
    if next(uniforms) < config.mask_whole_caption:
        captions = _captions(tokens[: _read_size(len(tokens), room, 1)], vocabulary)
        if len(captions):
            return captions[[int(next(uniforms) * len(captions))]]
    num_spans = min(_draw_num_spans(uniforms, config), vocabulary.sentinels.size)
    while num_spans:
        source = tokens[: _read_size(len(tokens), room, num_spans)]
        segments = find_segments(source, vocabulary, across_documents=config.scope == "authors")
        if (segments[:, 1] - segments[:, 0]).sum() >= num_spans:
            return _draw_spans(num_spans, segments, len(source), uniforms)
        num_spans -= 1
    return _NONE


def _draw_num_spans(uniforms: Iterator[float], config: Cm3Config) -> int:
    """Poisson(mean_spans) capped at max_spans, by inversion of one uniform number."""
    uniform = next(uniforms)
    probability = cumulated = math.exp(-config.mean_spans)
    num_spans = 0
    while uniform >= cumulated and num_spans < config.max_spans:
        num_spans += 1
        probability *= config.mean_spans / num_spans
        cumulated += probability
    return num_spans


def _captions(source: Tokens, vocabulary: JointVocabulary) -> Spans:
    segments = find_segments(source, vocabulary)
    is_caption = [
        start > 0
        and end + 1 < len(source)
        and source[end] == vocabulary.break_
        and vocabulary.modality[source[end + 1]] == IMAGE
        and bool(np.all(vocabulary.modality[source[start:end]] == TEXT))
        for start, end in segments
    ]
    return segments[np.array(is_caption, dtype=bool)]


def _draw_spans(num_spans: int, segments: Spans, size: int, uniforms: Iterator[float]) -> Spans:
    """`num_spans` spans within the segments; there must be room for them."""
    for _ in range(MAX_DRAWS):
        ends = sorted(int(next(uniforms) * (size + 1)) for _ in range(2 * num_spans))
        spans = _clip(np.array(ends).reshape(-1, 2), segments)
        if np.all(spans[:, 0] < spans[:, 1]):
            return spans
    places = np.concatenate([np.arange(start, end) for start, end in segments])
    chosen: set[int] = set()
    for last in range(len(places) - num_spans, len(places)):
        drawn = int(next(uniforms) * (last + 1))
        chosen.add(last if drawn in chosen else drawn)
    starts = places[sorted(chosen)]
    return np.stack([starts, starts + 1], axis=1)


def _clip(spans: Spans, segments: Spans) -> Spans:
    """Each span's part in the segment with which it overlaps most, the first of equals."""
    starts = np.maximum(spans[:, :1], segments[:, 0])
    ends = np.minimum(spans[:, 1:], segments[:, 1])
    rows = np.arange(len(spans))
    best = np.argmax(ends - starts, axis=1)
    return np.stack([starts[rows, best], ends[rows, best]], axis=1)


def _move(
    tokens: Tokens,
    documents: NDArray[np.int64],
    spans: Spans,
    vocabulary: JointVocabulary,
    config: Cm3Config,
) -> tuple[Tokens, NDArray[np.int64]]:
    """Tokens and documents with `spans` moved to the end, or before the `</s>` at the end."""
    if not len(spans):
        return tokens, documents
    closes = config.scope == "document" and tokens[-1] == vocabulary.eos
    end = len(tokens) - closes
    sentinels = vocabulary.sentinels.start + np.arange(len(spans))
    eoss = np.full(len(spans), vocabulary.eoss)
    first, last = documents[spans[:, 0]], documents[spans[:, 1] - 1]
    moved = (
        _rearrange(tokens[:end], spans, sentinels, eoss),
        _rearrange(documents[:end], spans, first, last),
    )
    return np.append(moved[0], tokens[end:]), np.append(moved[1], documents[end:])


def _rearrange(values: Tokens, spans: Spans, opening: Tokens, closing: Tokens) -> Tokens:
    """`opening` [k] stands in place of each span and before it at the end, `closing` behind it."""
    kept: list[Tokens] = []
    moved: list[Tokens] = []
    done = 0
    for index, (start, end) in enumerate(spans):
        opens, closes = opening[index : index + 1], closing[index : index + 1]
        kept += [values[done:start], opens]
        moved += [opens, values[start:end], closes]
        done = end
    return np.concatenate([*kept, values[done:], *moved])
