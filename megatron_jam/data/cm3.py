"""The CM3 objective on blocks of packed documents; data/cm3_reference.py says what it is."""

import numpy as np
from numpy.typing import NDArray

from megatron_jam.config.data import Cm3Config
from megatron_jam.data.sample import Block, Packing, Sample, sample_key
from megatron_jam.ops.extension import Cm3
from megatron_jam.tokenizers.vocabulary import IMAGE, TEXT, JointVocabulary

Tokens = NDArray[np.int32]


class Cm3Transform:
    """Moves spans of a block to its end, or to the end of their document. In C++."""

    def __init__(self, vocabulary: JointVocabulary, config: Cm3Config) -> None:
        """Draw spans as `config` says."""
        self._transform = Cm3(
            block=Block,
            mean_spans=config.mean_spans,
            max_spans=min(config.max_spans, vocabulary.sentinels.size),
            mask_whole_caption=config.mask_whole_caption,
            scope=config.scope,
            pad=vocabulary.pad,
            eos=vocabulary.eos,
            break_=vocabulary.break_,
            eoss=vocabulary.eoss,
            first_sentinel=vocabulary.sentinels.start,
            text=TEXT,
            image=IMAGE,
            modality=vocabulary.modality,
        ).transform

    def __call__(self, block: Block, *, seed: int, index: int) -> Block:
        """The block of the same size that (seed, index) makes of `block`, 64-bit integers both.

        It has `block`'s own arrays if nothing moves. :func:`undo_cm3` is the inverse, without the
        `dropped` tokens at the end that had to make room.
        """
        return self._transform(block.tokens, block.runs, seed, index)


def undo_cm3(block: Block, vocabulary: JointVocabulary, config: Cm3Config) -> Tokens:
    """The tokens that :class:`Cm3Transform` read: all spans back in place, without padding.

    Raises:
        ValueError: sentinels and `<eoss>` do not match.
    """
    borders = np.flatnonzero(np.diff(block.documents)) + 1 if config.scope == "document" else []
    pieces = [_undo(piece, vocabulary) for piece in np.split(block.tokens, borders)]
    tokens = np.concatenate(pieces)
    content = np.flatnonzero(tokens != vocabulary.pad)
    return tokens[: content[-1] + 1 if content.size else 0]


def _undo(tokens: Tokens, vocabulary: JointVocabulary) -> Tokens:
    first = np.flatnonzero(tokens == vocabulary.sentinel(0))
    if not first.size:
        return tokens
    source, moved = tokens[: first[1]], tokens[first[1] :]
    ends = np.flatnonzero(moved == vocabulary.eoss)
    starts = np.concatenate([[0], ends[:-1] + 1]) + 1  # after each sentinel
    sentinels = vocabulary.sentinels
    places = np.flatnonzero((source >= sentinels.start) & (source < sentinels.stop))
    pieces = np.split(source, np.stack([places, places + 1], axis=1).ravel())
    pieces[1::2] = [moved[start:end] for start, end in zip(starts, ends, strict=True)]
    return np.concatenate([*pieces, moved[ends[-1] + 1 :]])


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
        self._pad = vocabulary.pad
        self._transform = Cm3Transform(vocabulary, config)
        self._seed = sample_key(seed)
        self.epoch_size = packing.epoch_size
        self.epoch_tokens = packing.epoch_tokens

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        block = self._transform(self._packing.block(index), seed=self._seed, index=index)
        return Sample(block, self._pad, index)
