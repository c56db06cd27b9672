"""Cached, batched, guided decoding says what whole forwards of the plain reference say."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_jam.config.errors import UsageError
from megatron_jam.config.generation import SamplingConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.generation.decoder import Decoder
from megatron_jam.generation.row import Row, Rules, legal_table
from megatron_jam.generation.stages import Stages
from megatron_jam.generation.streams import Streams
from megatron_jam.models.attention import CausalAttention
from megatron_jam.models.twin import decoding_twin
from megatron_jam.parallel.world import World, start_world, stop_world
from megatron_jam.tokenizers.document import image_prompt, question_prompt, split_document
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.folder import WeightsFolder
from tests.generation.scenes import (
    SETTINGS,
    TOKENS_PER_IMAGE,
    VOCABULARY,
    build_chunks,
    prompts,
    reference,
    slow_decode,
    talkative_folder,
)
from tests.helpers.pico import LLAMA
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import build
from tests.helpers.transformer_engine import with_stand_ins

GREEDY = dataclasses.replace(SETTINGS, temperature=0, text_temperature=0)
RULES = Rules(
    vocabulary=VOCABULARY, tokens_per_image=TOKENS_PER_IMAGE, max_positions=64, max_new_tokens=40
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process alone."""
    yield start_world(ParallelConfig())
    stop_world()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tower, and JAM-Cross: with shared and own tables, of OPT's and of Chameleon's towers."""
    root = tmp_path_factory.mktemp("decoder")
    affine = {"bias": True, "affine_norm": True, "activation": "gelu"}
    return {
        "tower": talkative_folder(root / "tower", "tower"),
        "cross": talkative_folder(root / "cross", "cross"),
        "separate": talkative_folder(root / "separate", "separate"),
        "affine": talkative_folder(root / "affine", "cross", **affine),
        "chameleon": talkative_folder(
            root / "chameleon", "cross", num_layers=4, **LLAMA, qk_norm=True
        ),
    }


@pytest.fixture(scope="module")
def decoder(folders: dict[str, Path], world: World) -> Decoder:
    """A JAM-Cross in float64."""
    return decoder_of(folders["cross"], world)


def decoder_of(path: Path, world: World) -> Decoder:
    stages = Stages(build_chunks(path, world), world)
    return Decoder(stages, world, VOCABULARY, tokens_per_image=TOKENS_PER_IMAGE)


def lists(tokens: list[np.ndarray]) -> list[list[int]]:
    return [each.tolist() for each in tokens]


@pytest.mark.parametrize("kind", ["tower", "cross", "affine", "separate", "chameleon"])
@torch.inference_mode()
def test_cache_gives_the_logits_of_whole_forwards(
    kind: str, folders: dict[str, Path], world: World
) -> None:
    """Both streams, at every step, for rows that enter and leave pictures and end apart."""
    (model,) = build_chunks(folders[kind], world)
    model.eval()
    rows = [Row(RULES, prompt, index=i) for i, prompt in enumerate(prompts())]
    streams = Streams(Stages([model], world), rows, RULES, guided=True)
    legal = legal_table(VOCABULARY)
    generator = np.random.default_rng(3)
    conditional: list[dict[int, Tensor]] = [{} for _ in rows]
    unconditional: list[tuple[list[int], Tensor]] = []
    while not all(row.done for row in rows):
        cond, uncond = streams.step()
        assert (uncond is not None) == any(row.in_picture for row in rows)
        for i, row in enumerate(rows):
            if row.done:
                continue
            conditional[i][len(row.tokens)] = cond[i]
            if row.in_picture:
                unconditional.append(([*row.unconditional, row.tokens[-1]], uncond[i]))
            choices = np.flatnonzero(legal[row.legal])
            if VOCABULARY.break_ in choices and (chance := generator.random()) < 0.35:
                choices = [VOCABULARY.break_ if chance < 0.3 else VOCABULARY.eos]
            row.push(int(generator.choice(choices)))
    streams.cache.detach()
    assert len({len(row.new_tokens) for row in rows}) > 2
    assert len(unconditional) > 10 * TOKENS_PER_IMAGE
    for row, steps in zip(rows, conditional, strict=True):
        whole = reference(folders[kind], row.tokens)
        assert list(steps) == list(range(row.prompt_length, len(row.tokens)))
        for length, logits in steps.items():
            torch.testing.assert_close(logits, whole[length - 1], rtol=0, atol=1e-10)
        tokens = torch.tensor([row.tokens])
        itself = model(tokens, torch.arange(tokens.shape[1])[None])[:, 0]
        torch.testing.assert_close(itself, whole, rtol=0, atol=1e-10)
    longest: list[tuple[list[int], Tensor]] = []  # what it says of a stream's beginnings, too
    for stream, logits in sorted(unconditional, key=lambda pair: -len(pair[0])):
        found = [whole for each, whole in longest if each[: len(stream)] == stream]
        if not found:
            longest.append((stream, reference(folders[kind], stream)))
            found = [longest[-1][1]]
        torch.testing.assert_close(logits, found[0][len(stream) - 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("tower", GREEDY), ("cross", SETTINGS)],
    ids=["tower-greedy", "cross-sampled"],
)
def test_tokens_are_those_of_whole_forwards(
    kind: str, settings: SamplingConfig, folders: dict[str, Path], world: World
) -> None:
    written = decoder_of(folders[kind], world).generate(prompts(), settings, first_index=3)
    for i, (prompt, new) in enumerate(zip(prompts(), written, strict=True), start=3):
        assert new.tolist() == slow_decode(folders[kind], prompt, settings, i)


def test_guidance_of_one_is_no_guidance(folders: dict[str, Path], decoder: Decoder) -> None:
    settings = dataclasses.replace(SETTINGS, guidance_scale=1.0)
    written = lists(decoder.generate(prompts(), settings))
    for i, (prompt, new) in enumerate(zip(prompts(), written, strict=True)):
        assert new == slow_decode(folders["cross"], prompt, settings, i, guided=False)
    assert written != lists(decoder.generate(prompts(), SETTINGS))


def test_documents_are_well_formed(decoder: Decoder) -> None:
    """Whole pictures between breaks, no token of the wrong kind, an end for a reason."""
    num_pictures = num_ended = 0
    for seed in range(4):
        settings = dataclasses.replace(SETTINGS, seed=seed)
        for prompt, new in zip(prompts(), decoder.generate(prompts(), settings), strict=True):
            whole = np.concatenate([prompt, new])
            pictures = [part for kind, part in split_document(VOCABULARY, whole) if kind == "image"]
            assert all(len(codes) == TOKENS_PER_IMAGE for codes in pictures)
            num_pictures += len(pictures)
            allowed = [VOCABULARY.break_, VOCABULARY.eos]
            special = new[VOCABULARY.modality[new] == 2]
            assert np.isin(special, allowed).all()
            (breaks,) = np.nonzero(whole == VOCABULARY.break_)
            assert len(breaks) == 2 * len(pictures)
            assert (np.diff(breaks)[::2] == TOKENS_PER_IMAGE + 1).all()
            ended = new[-1] == VOCABULARY.eos
            num_ended += ended
            assert VOCABULARY.eos not in new[:-1]
            assert ended or len(new) >= 20
            assert len(new) <= 20 + TOKENS_PER_IMAGE + 1
    assert num_pictures > 16 + 5  # 16 stand in the prompts or begin there
    assert num_ended >= 1


def test_positions_run_out(decoder: Decoder) -> None:
    settings = dataclasses.replace(SETTINGS, max_new_tokens=1000)
    ends = []
    for prompt, new in zip(prompts(), decoder.generate(prompts(), settings), strict=True):
        assert len(prompt) + len(new) == 64 or new[-1] == VOCABULARY.eos
        ends.append(new[-1] == VOCABULARY.eos)
    assert not all(ends)


def test_an_image_prompt_gives_one_picture(decoder: Decoder) -> None:
    settings = dataclasses.replace(SETTINGS, max_new_tokens=1)
    (new,) = decoder.generate([image_prompt(VOCABULARY, [10, 11])], settings)
    assert (VOCABULARY.modality[new[:-1]] == 1).all()
    assert len(new) == TOKENS_PER_IMAGE + 1
    assert new[-1] == VOCABULARY.break_


@pytest.mark.parametrize("settings", [SETTINGS, GREEDY], ids=["sampled", "greedy"])
def test_a_document_does_not_depend_on_its_batch(
    settings: SamplingConfig, decoder: Decoder
) -> None:
    together = lists(decoder.generate(prompts(), settings))
    alone = [
        decoder.generate([prompt], settings, first_index=i)[0].tolist()
        for i, prompt in enumerate(prompts())
    ]
    halves = lists(decoder.generate(prompts()[:2], settings))
    halves += lists(decoder.generate(prompts()[2:], settings, first_index=2))
    assert together == alone == halves


def test_index_and_seed_change_the_draws(decoder: Decoder) -> None:
    prompt = question_prompt(VOCABULARY, [20, 21])
    first, second = lists(decoder.generate([prompt, prompt], SETTINGS))
    other = dataclasses.replace(SETTINGS, seed=SETTINGS.seed + 1)
    assert first != second
    assert first != decoder.generate([prompt], other)[0].tolist()
    first, second = lists(decoder.generate([prompt, prompt], GREEDY))
    assert first == second


def test_the_model_is_left_without_a_cache(folders: dict[str, Path], world: World) -> None:
    (model,) = build_chunks(folders["tower"], world)
    stages = Stages([model], world)
    decoder = Decoder(stages, world, VOCABULARY, tokens_per_image=TOKENS_PER_IMAGE)
    assert decoder.generate([], SETTINGS) == []
    decoder.generate(prompts()[:1], SETTINGS)
    # So that the prefill fails.
    model.embedding.tables["main"].positions = torch.nn.Embedding(2, 32)
    with pytest.raises(IndexError):
        Streams(stages, [Row(RULES, prompts()[2], index=0)], RULES, guided=False)
    attentions = [m for m in model.modules() if isinstance(m, CausalAttention)]
    assert len(attentions) == 3
    assert all(attention.cache is None for attention in attentions)
    assert not model.training


def generate_on_ranks(world: World, path: Path, settings: SamplingConfig) -> list[list[int]]:
    return lists(decoder_of(path, world).generate(prompts(), settings))


def refusal(world: World, path: Path) -> str:
    try:
        decoder_of(path, world)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("tower", {"tensor": 4}),
        ("cross", {"tensor": 2}),
        ("cross", {"tensor": 2, "pipeline": 2}),
        pytest.param("separate", {"pipeline": 3}, marks=pytest.mark.slow),
        ("chameleon", {"pipeline": 2, "interleave": 2}),
    ],
    ids=str,
)
def test_ranks_write_the_same(
    kind: str,
    layout: dict[str, int],
    pool: WorkerPool,
    folders: dict[str, Path],
    world: World,
) -> None:
    """As one rank, whatever the layout; the last rank of four holds padding."""
    assert VOCABULARY.size % 4
    settings = dataclasses.replace(SETTINGS, max_new_tokens=8)
    single = lists(decoder_of(folders[kind], world).generate(prompts(), settings))
    parallel = ParallelConfig(**layout)
    ranks = pool.run(generate_on_ranks, parallel, folders[kind], settings)
    assert ranks == [single] * (parallel.tensor * parallel.pipeline)


def generate_with_twin(
    world: World, path: Path, settings: SamplingConfig, **model: str
) -> list[list[int]]:
    """What a model in training writes."""
    chunks = build(WeightsFolder(path), world, torch.float64, dropout=0.5, **model)
    twin, plain = decoding_twin(chunks, world)
    held, shared = ({id(p) for c in each for p in c.parameters()} for each in (chunks, twin))
    assert shared == held, "nothing is copied"
    decoder = Decoder(Stages(twin, plain), plain, VOCABULARY, tokens_per_image=TOKENS_PER_IMAGE)
    return lists(decoder.generate(prompts(), settings))


def test_a_model_in_training_writes_what_its_weights_write(
    pool: WorkerPool, folders: dict[str, Path], world: World
) -> None:
    """With fused norms and attention, and sequences that ranks share in both ways."""
    settings = dataclasses.replace(SETTINGS, max_new_tokens=8)
    single = lists(decoder_of(folders["affine"], world).generate(prompts(), settings))
    parallel = ParallelConfig(context=2, tensor=2, sequence=True)
    call = (generate_with_twin, folders["affine"], settings)
    assert pool.run(with_stand_ins, parallel, *call) == [single] * 4


def test_sequence_parallelism_is_refused(pool: WorkerPool, folders: dict[str, Path]) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True)
    told = pool.run(refusal, parallel, folders["cross"])
    assert all("parallel.sequence is set; generation goes token by token" in x for x in told)


def test_what_does_not_fit_is_refused(folders: dict[str, Path], world: World) -> None:
    model = Stages(build_chunks(folders["tower"], world), world)
    assert Decoder(model, world, VOCABULARY, tokens_per_image=60)
    with pytest.raises(UsageError, match="max_positions 64 is too short for a picture of 61"):
        Decoder(model, world, VOCABULARY, tokens_per_image=61)
    other = JointVocabulary.build(text_size=300, num_image_codes=16, num_sentinels=5)
    with pytest.raises(UsageError, match="the vocabulary has 323 ids, the model 322"):
        Decoder(model, world, other, tokens_per_image=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", -1.0),
        ("guidance_scale", float("nan")),
        ("temperature", -0.1),
        ("text_temperature", float("inf")),
        ("top_p", 0.0),
        ("text_top_p", 1.1),
        ("max_new_tokens", 0),
        ("seed", 2**63),
    ],
)
def test_wrong_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"sampling.{name} must be"):
        SamplingConfig(**{name: value})
