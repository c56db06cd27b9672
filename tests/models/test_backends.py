"""The layers of Transformer Engine, on stand-ins: the spec tree, names of weights, layouts, FP8."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core
import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import BridgeConfig, ModelConfig
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.data.loader import positions_within
from megatron_jam.models import backends
from megatron_jam.models.attention import CausalAttention
from megatron_jam.models.norms import LayerNorm
from megatron_jam.models.parameters import parameter_table
from megatron_jam.models.sharding import holders
from megatron_jam.parallel.fused import Found
from megatron_jam.parallel.world import World
from megatron_jam.weights.folder import WeightsFolder
from tests.helpers import transformer_engine as stand_ins
from tests.helpers.pico import LLAMA, pico_config, pico_folder
from tests.helpers.pool import WorkerPool
from tests.helpers.runs import build, distance, loss_and_gradients, random_batch, whole_logits
from tests.helpers.transformer_engine import STAND_INS, with_stand_ins

OPT = {"bias": True, "affine_norm": True}


def unequal() -> ModelConfig:
    """A narrower image tower of another norm, with a norm on what bridges read."""
    config = pico_config("cross", **OPT)
    image = dataclasses.replace(
        config.towers["image"], hidden_size=24, num_kv_heads=4, ffn_size=40, norm="rms"
    )
    towers = {"image": image, "text": config.towers["text"]}
    return dataclasses.replace(config, towers=towers, bridges=BridgeConfig(every=2, kv_norm=True))


CONFIGS = {
    "cm3leon": pico_config("tower"),
    "opt": pico_config("tower", **OPT),
    "grouped-norms": pico_config("tower", **OPT, norm_groups=2),
    "llama": pico_config("tower", **LLAMA),
    "chameleon": pico_config("tower", **LLAMA, qk_norm=True),
    "cross": pico_config("cross", **OPT, activation="gelu"),
    "cross-cm3leon": pico_config("cross"),
    "unequal": unequal(),
}
LAYOUTS = {
    "one": (ParallelConfig(), "none"),
    "tp2": (ParallelConfig(tensor=2), "selective"),
    "tp2-sp": (ParallelConfig(tensor=2, sequence=True), "full"),
}
CONTEXT = {
    "cp2": (ParallelConfig(context=2), 1),
    "cp2-tp2-sp": (ParallelConfig(context=2, tensor=2, sequence=True), 1),
    "cp2-pp2": (ParallelConfig(context=2, pipeline=2), 1),
    "cp2-dp2": (ParallelConfig(context=2), 2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights folders of every kind of tower."""
    root = tmp_path_factory.mktemp("backends")
    return {name: pico_folder(root / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def torch_backend(pool: WorkerPool, folders: dict[str, Path]) -> dict[str, Any]:
    """Loss and gradients of one rank with torch's layers, in float64."""
    return {
        name: pool.run(loss_and_gradients, ParallelConfig(), path, batch_of(path), torch.float64)[0]
        for name, path in folders.items()
    }


def batch_of(path: Path) -> dict[str, Tensor]:
    """Four samples of 16 tokens."""
    return random_batch(WeightsFolder(path).config.vocab_size, samples=4, length=16)


def signature(source: Path, name: str) -> list[tuple[str, str, str | None]]:
    """Kind, name and default of each argument of a function or method in a file."""
    owner, _, function = name.partition(".")
    tree: Any = ast.parse(source.read_text())
    if function:
        (tree,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner)
    wanted = function or owner
    (node,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == wanted)
    return arguments_of(node.args)


def arguments_of(args: ast.arguments) -> list[tuple[str, str, str | None]]:
    defaults = [None] * (len(args.args) - len(args.defaults)) + list(args.defaults)
    pairs = [("plain", a, d) for a, d in zip(args.args, defaults, strict=True)]
    pairs += [("keyword", a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    pairs += [(kind, a, None) for kind, a in (("*", args.vararg), ("**", args.kwarg)) if a]
    return [(kind, a.arg, None if d is None else ast.unparse(d)) for kind, a, d in pairs]


@pytest.mark.parametrize(
    "name",
    [
        "TEColumnParallelLinear.__init__",
        "TELayerNormColumnParallelLinear.__init__",
        "TELayerNormColumnParallelLinear.forward",
        "TERowParallelLinear.__init__",
        "TEDotProductAttention.__init__",
        "TEDotProductAttention.forward",
        "te_checkpoint",
    ],
)
def test_stand_ins_take_what_megatrons_wrappers_take(name: str) -> None:
    expected = signature(Path(megatron.core.__path__[0]) / "extensions/transformer_engine.py", name)
    assert len(expected) > 1
    taken = signature(Path(stand_ins.__file__), name)
    added = [each for each in taken if each not in expected]
    assert [each for each in taken if each in expected] == expected
    assert {each[1] for each in added} <= {"name"}  # Megatron-Core 0.16 has none


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(
            kind,
            layout,
            marks=[] if layout == "tp2-sp" or kind in ("opt", "unequal") else pytest.mark.slow,
        )
        for kind in CONFIGS
        for layout in LAYOUTS
    ],
)
def test_gradients_equal_those_of_torch(
    kind: str, layout: str, folders: dict[str, Path], torch_backend: dict, pool: WorkerPool
) -> None:
    parallel, recompute = LAYOUTS[layout]
    path = folders[kind]
    run = (loss_and_gradients, path, batch_of(path), torch.float64, recompute)
    loss, gradients = pool.run(with_stand_ins, parallel, *run)[0]
    assert loss == pytest.approx(torch_backend[kind][0], rel=1e-12)
    assert distance(torch_backend[kind][1], gradients) < 1e-7


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_those_of_torch(kind: str, folders: dict[str, Path], pool: WorkerPool) -> None:
    tokens = batch_of(folders[kind])["tokens"]
    run = (folders[kind], tokens, torch.float64)
    expected = pool.run(whole_logits, ParallelConfig(), *run)[0]
    logits = pool.run(with_stand_ins, ParallelConfig(), whole_logits, *run)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("llama", "cp2-pp2"), *(("cross", each) for each in CONTEXT)]
    + [
        pytest.param("llama", each, marks=pytest.mark.slow) for each in CONTEXT if each != "cp2-pp2"
    ],
)
def test_context_parallelism_changes_nothing(
    kind: str, layout: str, folders: dict[str, Path], torch_backend: dict, pool: WorkerPool
) -> None:
    """Ranks hold zigzag shares of each sequence; the stand-in gathers keys and values."""
    parallel, data = CONTEXT[layout]
    path = folders[kind]
    run = (loss_and_gradients, path, batch_of(path), torch.float64)
    results = pool.run(with_stand_ins, parallel, *run, data=data)
    loss, gradients = results[0]
    assert loss == pytest.approx(torch_backend[kind][0], rel=1e-12)
    assert distance(torch_backend[kind][1], gradients) < 1e-7


def parts_in_use(world: World, path: Path, **settings: Any) -> dict[str, Any]:
    """Class names in layer 2, keys and sequence-parallel marks of this rank's parameters."""
    (model,) = build(WeightsFolder(path), world, torch.float64, **settings)
    layer = model.layers["2"]
    names = {}
    for name, module in layer.named_modules():
        if name.endswith(("norm", "qkv", "linear_q", "linear_kv", "proj", "fc1", "fc2", "fused")):
            names[name] = type(module).__name__
    held = holders(model)
    marks = {h.key: getattr(h.parameter, "sequence_parallel", False) for h in held}
    own = dict(model.named_parameters())
    return {"names": names, "marks": marks, "own": list(own)}


@pytest.mark.parametrize("kind", ["cm3leon", "opt", "llama", "chameleon"])
def test_an_affine_norm_is_one_with_the_linear_layer_behind_it(
    kind: str, folders: dict[str, Path], pool: WorkerPool
) -> None:
    seen = pool.run(with_stand_ins, ParallelConfig(), parts_in_use, folders[kind])[0]["names"]
    fuses = CONFIGS[kind].towers["main"].affine_norm
    column = f"TE{'LayerNorm' if fuses else ''}ColumnParallelLinear"
    norm = IdentityOp.__name__ if fuses else LayerNorm.__name__
    tower = "towers.main"
    assert seen[f"{tower}.self_attention.linear_qkv"] == column
    assert seen[f"{tower}.mlp.linear_fc1"] == column
    assert seen[f"{tower}.input_layernorm"] == seen[f"{tower}.pre_mlp_layernorm"] == norm
    assert seen[f"{tower}.self_attention.linear_proj"] == "TERowParallelLinear"
    assert seen[f"{tower}.mlp.linear_fc2"] == "TERowParallelLinear"
    assert seen[f"{tower}.self_attention.core_attention.fused"] == "TEDotProductAttention"


def test_a_bridge_fuses_the_norm_of_its_queries_alone(
    folders: dict[str, Path], pool: WorkerPool
) -> None:
    seen = pool.run(with_stand_ins, ParallelConfig(), parts_in_use, folders["unequal"])[0]["names"]
    for name in ("image", "text"):
        bridge = f"bridges.{name}"
        assert seen[f"{bridge}.pre_cross_attn_layernorm"] == "IdentityOp"
        attention = f"{bridge}.cross_attention"
        assert seen[f"{attention}.linear_q"] == "TELayerNormColumnParallelLinear"
        assert seen[f"{attention}.linear_kv"] == "TEColumnParallelLinear"
        assert seen[f"{attention}.core_attention.fused"] == "TEDotProductAttention"
        assert seen[f"{bridge}.mlp.linear_fc1"] == "TELayerNormColumnParallelLinear"


@pytest.mark.parametrize("kind", CONFIGS)
def test_keys_and_marks_do_not_depend_on_the_backend(
    kind: str, folders: dict[str, Path], pool: WorkerPool
) -> None:
    """Checkpoints are named by keys; marks say whose gradients sequence parallelism sums."""
    parallel = ParallelConfig(tensor=2, sequence=True)
    mine = pool.run(parts_in_use, parallel, folders[kind])[0]
    fused = pool.run(with_stand_ins, parallel, parts_in_use, folders[kind])[0]
    assert fused["marks"] == mine["marks"]
    modules = {entry.module for entry in parameter_table(CONFIGS[kind])}
    assert set(fused["marks"]) == modules
    towers = CONFIGS[kind].towers.values()
    fusible = any(tower.affine_norm and tower.norm_groups == 1 for tower in towers)
    assert any("layer_norm_weight" in name for name in fused["own"]) == fusible


@torch.no_grad()
def documents_logits(world: World, path: Path, tokens: Tensor, **settings: Any) -> Tensor:
    """Logits [B, S, V] with two documents in each row."""
    (model,) = build(WeightsFolder(path), world, torch.float64, **settings)
    documents = (torch.arange(tokens.shape[1]) >= 7).long().expand_as(tokens).contiguous()
    return model(tokens, positions_within(documents), documents=documents)


@pytest.mark.parametrize("kind", ["chameleon", "cross"])
def test_isolated_documents_take_torchs_attention(
    kind: str, folders: dict[str, Path], pool: WorkerPool
) -> None:
    run = (folders[kind], batch_of(folders[kind])["tokens"])
    expected = pool.run(documents_logits, ParallelConfig(), *run)[0]
    logits = pool.run(with_stand_ins, ParallelConfig(), documents_logits, *run)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


class Fp8Context:
    """Counts how often the layers run in FP8."""

    entered: list[str | None]

    def __init__(self, config: Any) -> None:
        self.fp8 = (config.fp8, config.fp8_recipe, config.fp8_amax_history_len)

    def __enter__(self) -> None:
        Fp8Context.entered.append(self.fp8)

    def __exit__(self, *_: Any) -> None:
        pass


def fp8_run(world: World, path: Path, batch: dict[str, Tensor], fp8: str, **settings: Any) -> Any:
    """What FP8 context a step of two micro-batches enters, and how it recomputes."""
    Fp8Context.entered, kept = [], []

    def te_checkpoint(*args: Any) -> Any:
        kept.append(args[3] is world.groups.tp)
        return stand_ins.te_checkpoint(*args)

    with (
        mock.patch.object(backends, "get_fp8_context", Fp8Context),
        mock.patch.object(STAND_INS, "te_checkpoint", te_checkpoint),
    ):
        run = (world, path, batch, torch.float64, "full", 2)
        loss, _ = loss_and_gradients(*run, fp8=fp8, **settings)
    (model,) = build(WeightsFolder(path), world, torch.float64, fp8=fp8, **settings)
    for module in model.modules():
        module.is_first_microbatch = False
    model.set_is_first_microbatch()
    begins = all(module.is_first_microbatch for module in model.modules())
    return loss, Fp8Context.entered, kept, begins


@pytest.mark.parametrize(
    ("fp8", "form"), [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("mxfp8", "e4m3")]
)
def test_layers_run_in_the_fp8_recipe(
    fp8: str, form: str, tmp_path: Path, pool: WorkerPool
) -> None:
    config = pico_config("tower", num_layers=2, hidden_size=64, num_heads=2)
    path = pico_folder(tmp_path / "tower", config)
    run = (path, batch_of(path))
    expected = pool.run(loss_and_gradients, ParallelConfig(), *run, torch.float64)[0]
    loss, entered, kept, begins = pool.run(with_stand_ins, ParallelConfig(), fp8_run, *run, fp8)[0]
    assert loss == pytest.approx(expected[0], rel=1e-12)
    assert entered == [(form, fp8, 1024)] * 2  # a forward pass of each micro-batch
    assert kept == [True] * 4  # its two layers, with Transformer Engine's own recomputation
    assert begins, "Megatron must say when a step begins, or weights in FP8 stay those of the first"


@pytest.mark.parametrize(
    ("settings", "fp8", "tensor", "message"),
    [
        ({}, "delayed", 4, "a rank's hidden_size"),
        ({"hidden_size": 64, "ffn_size": 72}, "tensorwise", 1, "ffn_size of tower main .* not 72"),
        ({"hidden_size": 64}, "blockwise", 1, "a multiple of 128, not 64"),
        ({"hidden_size": 64, "num_heads": 4}, "mxfp8", 4, "num_heads x head size .* not 16"),
    ],
)
def test_widths_that_fp8_cannot_take_are_refused(
    settings: dict[str, Any], fp8: str, tensor: int, message: str
) -> None:
    from megatron_jam.models.jam import check_layout

    config = pico_config("tower", **{"hidden_size": 40, **settings})
    check_layout(config, ParallelConfig(tensor=tensor))
    with pytest.raises(UsageError, match=message):
        check_layout(config, ParallelConfig(tensor=tensor), fp8)


def test_without_a_gpu_the_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="needs an NVIDIA GPU; take backend torch here"):
        backends.wrappers(torch.device("cpu"))


def test_without_transformer_engine_the_backend_is_refused() -> None:
    missing = Found(missing="no Transformer Engine")
    with (
        mock.patch.object(backends, "find_transformer_engine", return_value=missing),
        pytest.raises(UsageError, match=r"no Transformer Engine; install it with .*\[gpu\]"),
    ):
        backends.wrappers(torch.device("cuda"))


def torch_on_two(world: World, path: Path) -> str:
    """How torch's layers, which generation and evaluation build, meet a shared sequence."""
    try:
        build(WeightsFolder(path), world, torch.float64)
    except UsageError as error:
        return str(error)
    return "built"


def test_torchs_layers_refuse_context_parallelism(
    folders: dict[str, Path], pool: WorkerPool
) -> None:
    said = pool.run(torch_on_two, ParallelConfig(context=2), folders["opt"])
    assert all(re.search(r"parallel.context is 2, but .*; set it to 1", line) for line in said)
    assert len(said) == 2


def test_torchs_parts_have_no_kernel_of_their_own() -> None:
    parts = backends.Parts()
    assert parts.norm_column is None
    assert parts.attention is CausalAttention
    assert issubclass(parts.column, nn.Module)
