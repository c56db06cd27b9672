"""Checkpoints of metaseq: every form gives the same tensors."""

import dataclasses
import json
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import ModelConfig
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.metaseq.convert import read_metaseq
from megatron_jam.weights.metaseq.files import find_parts
from megatron_jam.weights.reference import reference_logits
from tests.helpers.commands import fails, tool
from tests.helpers.metaseq import save, settings_of, state_dict
from tests.helpers.pico import pico_config, pico_source, pico_tensors

CONFIGS = {
    "opt": pico_config("tower", bias=True, affine_norm=True),
    "cm3leon": pico_config("tower", activation="gelu", ffn_size=96),
    "swiglu": pico_config("tower", activation="silu", gated=True, ffn_size=80),
    "geglu": pico_config("tower", activation="gelu", gated=True, bias=True),
    "cross": pico_config("cross"),
    "cross-opt": pico_config("cross", bias=True, affine_norm=True),
}
FORMS: dict[str, dict[str, Any]] = {
    "one file": {},
    "apart": {"packed": False},
    "legacy": {"_use_new_zipfile_serialization": False},
    "parts": {"parts": 2, "padded": 14},
    "shards": {"shards": 3, "padded": 6},
    "parts of shards": {"parts": 4, "shards": 12},
}


def tensors_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random fp16 tensors that metaseq can hold: no biases in the bridges' attention."""
    tensors = {name: value.half() for name, value in pico_tensors(config).items()}
    for name in tensors:
        if name.startswith("bridges.") and ".attention." in name and name.endswith("bias"):
            tensors[name].zero_()
    return tensors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_form_gives_the_same_tensors(kind: str, form: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS[kind], text_ids=[0, 0], vocab_size=320 + 2)
    tensors = tensors_of(config)
    pattern = save(tmp_path / "in", config, tensors, **FORMS[form])
    # Two bridges of four layers may stand after each 2 or 3 of them.
    every = config.bridges.every if config.is_pair else 0
    certificate = read_metaseq(pattern, pico_source(tmp_path), every=every).write(tmp_path / "out")
    folder = WeightsFolder(tmp_path / "out")
    assert folder.config == config
    assert folder.names == list(tensors)
    for name, value in tensors.items():
        assert torch.equal(folder.read(name), value), name
    assert certificate["largest_difference"] == 0
    assert folder.provenance["certificate"]["same_likeliest"] == 1
    assert len(folder.provenance["files"]) == len(list((tmp_path / "in").iterdir()))


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    """OPT's tensors under metaseq's names, as its published files hold them."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 128, "num_hidden_layers": 2}
    settings = OPTConfig(
        vocab_size=328, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0, **sizes
    )
    model = OPTForCausalLM(settings).eval()
    whole = {}
    for key, tensor in model.state_dict().items():
        name = key.replace("model.decoder.final_layer_norm", "decoder.layer_norm")
        whole[name.removeprefix("model.").replace("lm_head", "decoder.output_projection")] = tensor
    config = pico_config("tower", num_layers=2, bias=True, affine_norm=True)
    values = {"cfg": settings_of(config), "model": OrderedDict(whole)}
    torch.save(values, tmp_path / "reshard.pt")
    read_metaseq(str(tmp_path / "reshard.pt"), pico_source(tmp_path)).write(tmp_path / "out")
    folder = WeightsFolder(tmp_path / "out")
    tokens = torch.randint(4, 300, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits[..., :322]
    assert (reference_logits(folder.config, folder.read, tokens) - expected).abs().max() < 1e-4


def test_output_rows_of_its_own(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["opt"], tied=False, text_ids=[0, 0])
    pattern = save(tmp_path / "in", config, tensors_of(config), parts=2, padded=2)
    read_metaseq(pattern, pico_source(tmp_path)).write(tmp_path / "out")
    folder = WeightsFolder(tmp_path / "out")
    assert folder.config == config
    for name, value in tensors_of(config).items():
        assert torch.equal(folder.read(name), value), name


@pytest.mark.parametrize("how", ["omegaconf", "args", "plain"])
def test_settings_in_every_class_that_held_them(how: str, tmp_path: Path) -> None:
    config = CONFIGS["cm3leon"]
    known = vars(settings_of(config)["model"])
    saved: dict[str, Any] = {
        "omegaconf": {"cfg": OmegaConf.create({"model": known, "layers": [1, 2]})},
        "args": {"args": Namespace(**known), "cfg": None},
        "plain": {"cfg": {"model": known}},
    }[how]
    whole = OrderedDict(state_dict(config, tensors_of(config)))
    torch.save({**saved, "model": whole}, tmp_path / "a.pt", pickle_protocol=2)
    found = read_metaseq(str(tmp_path / "a.pt"), pico_source(tmp_path)).config
    assert found.towers == config.towers


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a-model_part-0.pt", "a-model_part-2.pt"], "1 are missing, .* part 1, shard 0"),
        (["a-shard0.pt", "a-shard1.pt", "a-shard10.pt"], "8 are missing, .* shard 2"),
        (
            ["a-model_part-0-shard0.pt", "a-model_part-0-shard1.pt", "a-model_part-1-shard0.pt"],
            "1 are missing, .* part 1, shard 1",
        ),
        (["a-model_part-0.pt", "a.pt"], "the same part"),
        (["a-model_part-0-shard0.pt", "a-model_part-1.pt"], "mixes whole files with parts"),
        (["a.pt", "b.pt"], r"several checkpoints \(a, b\): name one"),
        (["a.txt"], "no checkpoint"),
    ],
)
def test_gaps_and_mixed_runs_are_named(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=message):
        find_parts(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ["restored.pt"],
        ["checkpoint_last_consolidated.pt"],
        ["run_consolidated-model_part-0.pt", "run_consolidated-model_part-1.pt"],
        ["checkpoint_last-shard0.pt", "checkpoint_last-shard1.pt"],
    ],
    ids=lambda names: names[0],
)
def test_what_metaseqs_scripts_leave_is_found(names: list[str], tmp_path: Path) -> None:
    for name in [*names, "dict.txt"]:
        (tmp_path / name).touch()
    found = [path.name for shards in find_parts(str(tmp_path)) for path in shards]
    assert found == names


def test_parts_are_in_numeric_order(tmp_path: Path) -> None:
    for part in range(12):
        (tmp_path / f"reshard-model_part-{part}.pt").touch()
    found = [path.name for (path,) in find_parts(str(tmp_path / "reshard*"))]
    assert found == [f"reshard-model_part-{part}.pt" for part in range(12)]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"shards": 3}, "hold .* numbers of .* are due: a shard is missing"),
        ({"parts": 2}, r"16 of 32 rows in 1 model part\(s\): of 2 parts 1 are missing"),
        ({"parts": 4}, r"24 of 32 rows in 3 model part\(s\): of 4 parts 1 are missing"),
        ({"parts": 4, "packed": False, "shards": 2}, r": of 4 parts 1 are missing"),
    ],
)
def test_a_missing_last_shard_or_part_is_noticed(
    form: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = CONFIGS["opt"]
    pattern = save(tmp_path / "in", config, tensors_of(config), **form)
    last = form["shards"] if "parts" in form and "shards" in form else 1
    for path in sorted((tmp_path / "in").iterdir())[-last:]:
        path.unlink()
    if form == {"parts": 2}:  # named alone
        pattern = str(next((tmp_path / "in").iterdir()))
    with pytest.raises(UsageError, match=message):
        read_metaseq(pattern, pico_source(tmp_path))


CHANGES: dict[str, tuple[Any, str]] = {
    "key": (lambda m, s: m.update({"decoder.extra": torch.ones(1)}), "has decoder.extra, which no"),
    "350m": (
        lambda m, s: m.update({"decoder.project_in_dim.weight": torch.ones(1)}),
        "no embeddings of another width .OPT-350M.",
    ),
    "post-norm": (
        lambda m, s: setattr(s["model"], "decoder_normalize_before", False),
        "norms behind each block",
    ),
    "scaled": (lambda m, s: setattr(s["model"], "no_scale_embedding", False), "scaled embeddings"),
    **{
        name: (
            lambda m, s, name=name, value=value: setattr(s["model"], name, value),
            f"towers here have no .*: its settings say {name}: {value}",
        )
        for name, value in (
            ("alibi", True),
            ("decoder_learned_pos", False),
            ("scale_fc", True),
            ("scale_heads", True),
            ("self_attn_doc_sep", 2),
        )
    },
    **{
        form: (
            lambda m, s, form=form: setattr(s["model"], "activation_fn", form),
            f"the checkpoint's activation is {form}; known are \\['gelu', 'relu'\\]",
        )
        for form in ("relu_squared", "tanh", "linear", "swiglu")
    },
    "untied": (
        lambda m, s: [
            setattr(s["model"], "share_decoder_input_output_embed", False),
            m.pop("decoder.output_projection.weight"),
        ],
        "nothing that gives head.output.weight",
    ),
    "heads": (lambda m, s: delattr(s["model"], "decoder_attention_heads"), "add --num_heads"),
    "layer": (
        lambda m, s: [m.pop(k) for k in list(m) if ".layers.1." in k],
        "layer 1 of the decoder is missing",
    ),
    "tensor": (lambda m, s: m.pop("decoder.layers.2.fc2.weight"), "nothing that gives layers.2"),
    "shape": (
        lambda m, s: m.update({"decoder.layers.2.fc2.weight": torch.ones(3, 3)}),
        r"has shape \[3, 3\], but layers.2.main.ffn.fc2.weight is \[32, 128\]",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_named(change: str, tmp_path: Path) -> None:
    config = CONFIGS["opt"]
    model, settings = state_dict(config, tensors_of(config)), settings_of(config)
    alter, message = CHANGES[change]
    alter(model, settings)
    torch.save({"cfg": settings, "model": model}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match=message):
        read_metaseq(str(tmp_path / "a.pt"), pico_source(tmp_path))


def test_parts_that_differ_in_what_they_share_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["opt"]
    pattern = save(tmp_path / "in", config, tensors_of(config), parts=2)
    path = tmp_path / "in/checkpoint_3-model_part-1.pt"
    values = torch.load(path, weights_only=False)
    values["model"]["decoder.layer_norm.bias"] += 1
    torch.save(values, path)
    with pytest.raises(UsageError, match=r"differ in decoder\.layer_norm\.bias"):
        read_metaseq(pattern, pico_source(tmp_path)).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def alter(path: Path, change: Any) -> None:
    values = torch.load(path, weights_only=False)
    torch.save(change(values), path)


def cut_positions(values: dict) -> dict:
    table = values["model"]["decoder.embed_positions.weight"]
    values["model"]["decoder.embed_positions.weight"] = table[:-1].clone()
    return values


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ({"parts": 2}, lambda v: [v], "part-1.*holds no `model`"),
        (
            {"shards": 3},
            lambda v: {**v, "optimizer_history": [{"num_updates": 4}]},
            "shard0.pt was saved after 3 updates and .*shard2.pt after 4",
        ),
        ({"parts": 2}, cut_positions, "they are not parts of one checkpoint"),
        ({"shards": 2}, lambda v: {**v, "shard_metadata": {}}, "has no shard_metadata"),
        ({"shards": 2}, lambda v: {**v, "shard_metadata": [1]}, "shard_metadata is not what FSDP"),
    ],
)
def test_a_spoilt_last_file_is_named(
    form: dict[str, int], change: Any, message: str, tmp_path: Path
) -> None:
    config = CONFIGS["opt"]
    pattern = save(tmp_path / "in", config, tensors_of(config), **form)
    alter(sorted((tmp_path / "in").iterdir())[-1], change)
    with pytest.raises(UsageError, match=message):
        read_metaseq(pattern, pico_source(tmp_path))


def test_the_plan_names_every_key_and_writes_nothing(tmp_path: Path) -> None:
    config = CONFIGS["opt"]
    pattern = save(tmp_path / "in", config, tensors_of(config), parts=2, padded=2)
    source = pico_source(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = ("--input", pattern, "--tokenizer", str(source))
    done = tool("convert_metaseq", *arguments, "--plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["key", "shape", "action", "becomes"]
    keys = {line[0] for line in lines[1:]}
    assert keys == set(
        torch.load(tmp_path / "in/checkpoint_3-model_part-0.pt", weights_only=False)["model"]
    )
    joined = next(line for line in done.stdout.splitlines() if "embed_tokens" in line)
    assert "324 x 32" in joined
    assert "join rows of 2 parts, drop 2 rows" in joined
    assert sorted(tmp_path.rglob("*")) == before
    done = tool("convert_metaseq", *arguments, "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "out/provenance.json").read_text())
    assert made["certificate"]["largest_difference"] == 0
    fails(tool("convert_metaseq", *arguments, cwd=tmp_path), "name the --output to write")
    fails(tool("convert_metaseq", "--input", "none", cwd=tmp_path), "none: no checkpoint")
    # What lies beside a checkpoint is looked for where there is one.
    fails(tool("convert_metaseq", "--input", "in", cwd=tmp_path), "no vocabulary at .*")
