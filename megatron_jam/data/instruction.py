"""Instruction tuning with the loss on answers only."""

from megatron_jam.data.sample import Packing, Sample
from megatron_jam.tokenizers.document import answer_mask
from megatron_jam.tokenizers.vocabulary import JointVocabulary


class AnswerDataset:
    """Whole question-answer documents; the answers' tokens and the `</s>` after each count."""

    def __init__(self, packing: Packing, *, vocabulary: JointVocabulary) -> None:
        """Read `packing`, whose blocks must start with a document's start."""
        self._packing = packing
        self._vocabulary = vocabulary
        self.epoch_size = packing.epoch_size
        self.epoch_tokens = packing.epoch_tokens

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        block = self._packing.block(index)
        counted = answer_mask(self._vocabulary, block.tokens)
        return Sample(block, self._vocabulary.pad, index, counted=counted)
