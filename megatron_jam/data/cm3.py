"""The CM3 objective (arXiv 2201.07520) on a block of packed documents, in numpy.

k spans of the block are moved to its end, so that a left-to-right model learns to fill gaps with
both sides in sight:

    a b c d e f g h   ->   a <sentinel:0> d e <sentinel:1> h
                           <sentinel:0> b c <eoss> <sentinel:1> f g <eoss>

- k is drawn from a Poisson distribution and capped; with k = 0 the block stays as it is.
- The moves add 3k tokens: the block's end is cut by as many *before* spans are drawn, so that the
  result has the block's length and no span loses its end. Trailing padding is used up first.
- The 2k ends are uniform over the block; sorted and taken in pairs, they are k uniform spans given
  that no two overlap. Each span is clipped to the segment with which it overlaps most (the first of
  equals); a segment is a run without `<break>`, `</s>` and `<pad>`. If a span is left empty, all
  ends are drawn again.
- With the chance `mask_whole_caption` the only span is one whole caption instead.

Apart from the tokens the result depends on nothing but the uniform numbers in [0, 1) that `rng`
gives, in order: one for the caption's chance (and one to choose it), one for k, 2k for each draw of
the ends.
"""

import math

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.data import Cm3Config
from megatron_jam.data.sample import Block, Packing, Sample, sample_from_block
from megatron_jam.tokenizers.vocabulary import IMAGE, TEXT, JointVocabulary

Tokens = NDArray[np.int64]
Spans = NDArray[np.int64]
"""[k, 2]: starts and ends (one past the last token), in order, disjoint."""

# Draws of all ends before single tokens are taken: reached only if nearly all is boundaries.
_MAX_DRAWS = 64


def cm3_transform(
    block: Block, vocabulary: JointVocabulary, rng: np.random.Generator, config: Cm3Config
) -> Block:
    """Move spans of the block to its end. :func:`undo_cm3` is the inverse.

    A moved span, with the sentinels and the `<eoss>` around it, stays of its document. Fewer spans
    than drawn are moved only where the block has no room for them.
    """
    tokens = block.tokens
    content = tokens[: _content_length(tokens, vocabulary)]
    spans = _choose_spans(content, len(tokens), vocabulary, rng, config)
    if not len(spans):
        return block
    sentinels = vocabulary.sentinels.start + np.arange(len(spans))
    eoss = np.full(len(spans), vocabulary.eoss)
    owners = block.documents[spans[:, 0]]
    documents = block.documents[: len(content)]
    return Block(
        tokens=_move(content, spans, len(tokens), sentinels, eoss, vocabulary.pad),
        documents=_move(documents, spans, len(tokens), owners, owners, documents[-1] + 1),
    )


def _choose_spans(
    content: Tokens,
    length: int,
    vocabulary: JointVocabulary,
    rng: np.random.Generator,
    config: Cm3Config,
) -> Spans:
    """The spans to move out of `content` in a block of `length` tokens."""
    caption = _draw_caption(content[: length - 3], vocabulary, rng, config)
    if caption is not None:
        return caption
    num_spans = min(_draw_num_spans(rng, config), vocabulary.sentinels.size)
    while num_spans:
        source = content[: max(0, length - 3 * num_spans)]
        segments = find_segments(source, vocabulary)
        if (segments[:, 1] - segments[:, 0]).sum() >= num_spans:
            return _draw_spans(num_spans, segments, len(source), rng)
        num_spans -= 1
    return np.empty((0, 2), dtype=np.int64)


def undo_cm3(tokens: Tokens, vocabulary: JointVocabulary) -> Tokens:
    """The source of a block that :func:`cm3_transform` made: all its spans back in place, without
    what was cut for them. A block without sentinels is returned as it is."""
    first = np.flatnonzero(tokens == vocabulary.sentinel(0))
    if not first.size:
        return tokens.copy()
    source, moved = tokens[: first[1]], tokens[first[1] :]
    ends = np.flatnonzero(moved == vocabulary.eoss)
    starts = np.concatenate([[0], ends[:-1] + 1]) + 1  # after each sentinel
    sentinels = vocabulary.sentinels
    places = np.flatnonzero((source >= sentinels.start) & (source < sentinels.stop))
    pieces = np.split(source, np.stack([places, places + 1], axis=1).ravel())
    pieces[1::2] = [moved[start:end] for start, end in zip(starts, ends, strict=True)]
    return np.concatenate(pieces)


def find_segments(tokens: Tokens, vocabulary: JointVocabulary) -> Spans:
    """The runs of `tokens` without `<break>`, `</s>` and `<pad>`, [segments, 2]: start and end."""
    border = np.isin(tokens, (vocabulary.break_, vocabulary.eos, vocabulary.pad))
    inside = np.concatenate([[False], ~border, [False]])
    return np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2)


def _content_length(tokens: Tokens, vocabulary: JointVocabulary) -> int:
    content = np.flatnonzero(tokens != vocabulary.pad)
    return int(content[-1]) + 1 if content.size else 0


def _draw_num_spans(rng: np.random.Generator, config: Cm3Config) -> int:
    """Poisson(mean_spans) capped at max_spans, by inversion of one uniform number."""
    uniform = rng.random()
    probability = cumulated = math.exp(-config.mean_spans)
    num_spans = 0
    while uniform >= cumulated and num_spans < config.max_spans:
        num_spans += 1
        probability *= config.mean_spans / num_spans
        cumulated += probability
    return num_spans


def _draw_caption(
    source: Tokens, vocabulary: JointVocabulary, rng: np.random.Generator, config: Cm3Config
) -> Spans | None:
    """One whole caption of `source`, [1, 2], with the chance of mask_whole_caption.

    A caption is a segment of text right before `<break>` and a picture. One at the block's very
    start may have lost its beginning, so it is none.
    """
    if rng.random() >= config.mask_whole_caption:
        return None
    segments = find_segments(source, vocabulary)
    is_caption = [
        start > 0
        and end + 1 < len(source)
        and source[end] == vocabulary.break_
        and vocabulary.modality[source[end + 1]] == IMAGE
        and bool(np.all(vocabulary.modality[source[start:end]] == TEXT))
        for start, end in segments
    ]
    captions = segments[np.array(is_caption, dtype=bool)]
    return captions[[int(rng.random() * len(captions))]] if len(captions) else None


def _draw_spans(num_spans: int, segments: Spans, length: int, rng: np.random.Generator) -> Spans:
    """`num_spans` spans within the segments; there must be room for them."""
    for _ in range(_MAX_DRAWS):
        ends = np.sort((rng.random(2 * num_spans) * (length + 1)).astype(np.int64))
        spans = _clip(ends.reshape(-1, 2), segments)
        if np.all(spans[:, 0] < spans[:, 1]):
            return spans
    places = np.concatenate([np.arange(start, end) for start, end in segments])
    chosen = np.sort(places[np.argsort(rng.random(len(places)), kind="stable")[:num_spans]])
    return np.stack([chosen, chosen + 1], axis=1)


def _clip(spans: Spans, segments: Spans) -> Spans:
    """Each span's part in the segment with which it overlaps most, the first of equals."""
    starts = np.maximum(spans[:, :1], segments[:, 0])
    ends = np.minimum(spans[:, 1:], segments[:, 1])
    rows = np.arange(len(spans))
    best = np.argmax(ends - starts, axis=1)
    return np.stack([starts[rows, best], ends[rows, best]], axis=1)


def _move(
    content: Tokens, spans: Spans, length: int, opening: Tokens, closing: Tokens, pad: int
) -> Tokens:
    """`content`, cut so that all fits, with `spans` moved to its end, padded to [length].

    `opening` [k] stands in place of each span and before it at the end, `closing` [k] behind it.
    """
    source = content[: length - 3 * len(spans)]
    kept: list[Tokens] = []
    moved: list[Tokens] = []
    done = 0
    for index, (start, end) in enumerate(spans):
        opens, closes = opening[index : index + 1], closing[index : index + 1]
        kept += [source[done:start], opens]
        moved += [opens, source[start:end], closes]
        done = end
    padding = np.full(length - len(source) - 3 * len(spans), pad)
    return np.concatenate([*kept, source[done:], *moved, padding])


class Cm3Dataset:
    """Blocks with the CM3 objective; every token but padding counts, sentinels too."""

    def __init__(
        self,
        packing: Packing,
        *,
        vocabulary: JointVocabulary,
        config: Cm3Config,
        seed: tuple[int, ...],
    ) -> None:
        """Read `packing`; the spans of sample i depend on (seed, i)."""
        self._packing = packing
        self._vocabulary = vocabulary
        self._config = config
        self._seed = seed

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        rng = np.random.default_rng((*self._seed, index))
        block = cm3_transform(self._packing.block(index), self._vocabulary, rng, self._config)
        return sample_from_block(block, pad=self._vocabulary.pad)
