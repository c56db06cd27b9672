"""The CM3 objective on blocks of 4,096 tokens over metaseq's transform; one thread.

The peer is what metaseq's CausalMaskedDocumentToSequenceDataset (metaseq/data/cm3_dataset.py,
f7ffa5f) does to a block, said again in our words with the same operations of torch and numpy: its
parent class, which packs blocks, is left out. Ours is what training calls: it reads and gives int32
tokens and which document they are of, run by run; metaseq's reads and gives int64 tokens.
"""

import itertools

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from benchmarks.timing import speed_over
from megatron_jam.config.cli import run_command
from megatron_jam.config.data import Cm3Config
from megatron_jam.data.cm3 import Cm3Transform
from megatron_jam.data.sample import Block
from megatron_jam.tokenizers.vocabulary import JointVocabulary

LENGTH, DOCUMENT = 4_096, 1_024
VOCABULARY = JointVocabulary.build(text_size=56_320, num_image_codes=8_192, num_sentinels=512)
SENTINELS = list(range(VOCABULARY.sentinels.start, VOCABULARY.sentinels.stop))

WORK = 40

Edges = tuple[int, int]


def main(*, pairs: PositiveInt = 9, blocks: PositiveInt = 100, json: bool = False) -> None:
    """Print ratios of tokens a second, ours over the peer's: above 1 ours is faster.

    Args:
        pairs: how often each is run.
        blocks: blocks that a run of the peer transforms; one of ours transforms 40 times as many.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    torch.set_num_threads(1)
    one = {"mean_spans": 100.0, "max_spans": 1}
    # Without <break> in it a block is one segment to the authors' scope, as it is to the peer.
    rows = [
        ("one span, over documents' ends", Cm3Config(scope="authors", **one), Peer(1, fixed=True)),
        ("one span within a document", Cm3Config(**one), Peer(1, fixed=True, limit=True)),
    ]
    for mean in (1, 3, 8):
        config = Cm3Config(scope="authors", mean_spans=float(mean), max_spans=511)
        rows.append((f"poisson {mean}, over documents' ends", config, Peer(mean)))
    for name, config, peer in rows:
        ours = Ours(config, WORK * blocks)
        row = speed_over(name, ours, peer.times(blocks), pairs=pairs, work=WORK)
        row.print(as_json=json)


def tokens() -> np.ndarray:
    """A block of four documents of texts, int32."""
    block = np.random.default_rng(0).integers(4, 50_000, LENGTH).astype(np.int32)
    block[DOCUMENT - 1 :: DOCUMENT] = VOCABULARY.eos
    return block


class Ours:
    """A block, transformed again and again with other draws."""

    def __init__(self, config: Cm3Config, blocks: int) -> None:
        documents = np.repeat(np.arange(LENGTH // DOCUMENT, dtype=np.int32), DOCUMENT)
        self._block = Block.of(tokens(), documents)
        self._transform = Cm3Transform(VOCABULARY, config)
        self._blocks = blocks
        self._numbers = itertools.count()

    def __call__(self) -> None:
        for _ in range(self._blocks):
            self._transform(self._block, seed=1, index=next(self._numbers))


class Peer:
    """metaseq's transform."""

    def __init__(self, expected: int, *, fixed: bool = False, limit: bool = False) -> None:
        """Draw `expected` spans, `fixed` or on average, within documents' `limit` or not."""
        self._expected, self._fixed, self._limit = expected, fixed, limit
        self._block = torch.from_numpy(tokens().astype(np.int64))

    def times(self, blocks: int):
        """A run of that many blocks."""

        def run() -> None:
            for _ in range(blocks):
                self(self._block)

        return run

    def __call__(self, block: Tensor) -> Tensor:
        """One block."""
        spans = self._draw(len(block))
        if (
            spans is not None and self._limit
        ):  # metaseq's main fails without spans; its branches not
            limits = self._documents(block)
            spans = [self._clip(span, limits) for span in spans]
        if spans is None:
            return block
        spans = sorted(spans, key=lambda span: span[0])
        source, kept = block.clone(), torch.ones_like(block).to(torch.bool)
        for number, (start, end) in enumerate(spans):
            source[start] = SENTINELS[number]
            kept[start + 1 : end] = False
        return torch.cat([source[kept], self._targets(block, spans)])[:LENGTH]

    def _draw(self, length: int) -> list[Edges] | None:
        count = self._expected
        if not self._fixed:
            drawn = torch.poisson(torch.tensor([float(count)]))
            count = drawn.clamp(0, len(SENTINELS) - 1).to(torch.int).item()
        if count == 0:
            return None
        if count == 1:
            low, high = np.random.uniform(size=2)
            low, high = min(low, high), max(low, high)
            start, end = int(low * length), int(high * length + 0.5)
            return None if start == end else [(start, end)]
        candidates = [tuple(np.random.uniform(size=2)) for _ in range(count**2)]
        edges = [(int(a * length), int(b * length + 0.5)) for a, b in candidates]
        edges = [(a, b) if a <= b else (b, a) for a, b in edges]
        chosen: list[Edges] = []
        while len(chosen) < count and edges:
            span = edges.pop()
            if not any(max(a, span[0]) < min(b, span[1]) for a, b in chosen):
                chosen.append(span)
        return chosen

    @staticmethod
    def _documents(block: Tensor) -> list[Edges]:
        ends = (block == VOCABULARY.eos).nonzero().cpu().squeeze().numpy().tolist()
        if ends[0] != 0:
            ends = [0, *ends]
        if ends[-1] != block.size(0) - 1:
            ends = [*ends, block.size(0)]
        return [(ends[i - 1], ends[i]) for i in range(1, len(ends))]

    @staticmethod
    def _clip(span: Edges, limits: list[Edges]) -> Edges:
        best, most = None, 0
        for limit in limits:
            overlap = max(0, min(span[1], limit[1]) - max(span[0], limit[0]))
            if overlap > most:
                best, most = limit, overlap
        return span if best is None else (max(span[0], best[0]), min(span[1], best[1]))

    @staticmethod
    def _targets(block: Tensor, spans: list[Edges]) -> Tensor:
        size = sum(end - start for start, end in spans) + 2 * len(spans)
        target = torch.zeros(size).to(block)
        place = 0
        for number, (start, end) in enumerate(spans):
            target[place] = SENTINELS[number]
            place += 1
            target[place : place + end - start] = block[start:end]
            target[place + end - start] = VOCABULARY.eoss
            place += end - start + 1
        return target


if __name__ == "__main__":
    run_command(main)
