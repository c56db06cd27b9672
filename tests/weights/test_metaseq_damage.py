"""Checkpoints of metaseq that are odd or damaged: what is wrong is said, and what to do."""

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.model import BridgeConfig, ModelConfig
from megatron_jam.models.parameters import Parameter
from megatron_jam.weights.conversion import Conversion
from megatron_jam.weights.folder import WeightsFolder
from megatron_jam.weights.metaseq.convert import read_metaseq
from megatron_jam.weights.metaseq.files import find_parts
from megatron_jam.weights.metaseq.pickles import TorchFile
from tests.helpers.commands import fails, tool
from tests.helpers.metaseq import save, settings_of, state_dict
from tests.helpers.pico import pico_config, pico_source
from tests.weights.test_metaseq import alter, tensors_of

OPT = pico_config("tower", num_layers=2, bias=True, affine_norm=True)
Values = dict[str, Any]


def put(path: Path, change: Callable[[Values], Any], config: ModelConfig = OPT) -> Path:
    """Write a checkpoint, changed."""
    model, settings = state_dict(config, tensors_of(config)), settings_of(config)
    values = {"cfg": settings, "model": model}
    change(values)
    torch.save(values, path)
    return path


def cross(every: int, layers: int) -> ModelConfig:
    config = pico_config("cross", num_layers=layers)
    return dataclasses.replace(config, bridges=BridgeConfig(every=every), text_ids=[0, 0])


def test_bridges_that_may_stand_behind_several_layers(tmp_path: Path) -> None:
    path, source = put(tmp_path / "a.pt", lambda v: None, cross(7, 8)), pico_source(tmp_path)
    with pytest.raises(UsageError, match=r"2 bridges .* 8 layers: .* --every of \[4, 5, 6, 7\]"):
        read_metaseq(str(path), source)
    with pytest.raises(UsageError, match=r"--every 3 does not fit, but \[4, 5, 6, 7\] do"):
        read_metaseq(str(path), source, every=3)
    arguments = ("--input", str(path), "--tokenizer", str(source), "--output", "out")
    fails(tool("convert_metaseq", *arguments, cwd=tmp_path), "--every of")
    done = tool("convert_metaseq", *arguments, "--every", "7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = WeightsFolder(tmp_path / "out")
    assert found.config.bridges.every == 7
    assert "bridges.7.text.ffn.fc1.weight" in found.names


@pytest.mark.parametrize("every", [1, 2, 4])
def test_the_papers_bridges_are_not_ambiguous(every: int, tmp_path: Path) -> None:
    path = put(tmp_path / "a.pt", lambda v: None, cross(every, 32))
    assert read_metaseq(str(path), pico_source(tmp_path)).config.bridges.every == every


def test_every_is_for_bridges(tmp_path: Path) -> None:
    path = put(tmp_path / "a.pt", lambda v: None)
    with pytest.raises(UsageError, match=r"0 bridges .*: leave --every out"):
        read_metaseq(str(path), pico_source(tmp_path), every=2)


def in_model(**changes: Any) -> Callable[[Values], Any]:
    return lambda v: v["model"].update(changes)


def said(name: str, value: Any) -> Callable[[Values], Any]:
    return lambda v: setattr(v["cfg"]["model"], name, value)


def all_whole(values: Values) -> None:
    values["model"] = {key: tensor.int() for key, tensor in values["model"].items()}


MYSTERY = "decoder.mystery"
ODD: dict[str, tuple[Callable[[Values], Any], str]] = {
    "cfg, text": (lambda v: v.update(cfg="text"), r"a\.pt: its settings \(cfg, and model in it\)"),
    "cfg, list": (lambda v: v.update(cfg=[1, 2]), r"a\.pt: its settings \(cfg, and model in it\)"),
    "cfg.model, list": (lambda v: v["cfg"].update(model=[1]), r"a\.pt: its settings .* no values"),
    "activation": (said("activation_fn", ["relu"]), r"\['relu'\]: add --activation"),
    "no activation": (said("activation_fn", ""), "do not say activation_fn: add --activation"),
    "heads": (said("decoder_attention_heads", "four"), "'four': add --num_heads"),
    "half heads": (said("decoder_attention_heads", 4.0), "4.0: add --num_heads"),
    "fc1": (
        in_model(**{"decoder.layers.0.fc1.weight": torch.ones(66).half()}),
        r"layers\.0\.fc1\.weight has shape \[66\], but a matrix",
    ),
    "norm": (
        in_model(**{"decoder.layer_norm.bias": torch.ones(1, 32).half()}),
        r"layer_norm\.bias has shape \[1, 32\], but head\.norm\.bias is \[32\]",
    ),
    "token table": (
        in_model(**{"decoder.embed_tokens.weight": torch.tensor(1.0).half()}),
        r"a\.pt: decoder\.embed_tokens\.weight is one number",
    ),
    "flat token table": (
        in_model(**{"decoder.embed_tokens.weight": torch.ones(322).half()}),
        r"embed_tokens\.weight has shape \[322\]",
    ),
    "positions": (
        in_model(**{"decoder.embed_positions.weight": torch.tensor(1.0).half()}),
        r"a\.pt: decoder\.embed_positions\.weight is one number",
    ),
    "key": (lambda v: v["model"].update({3: torch.ones(2)}), r"a\.pt: `model` has the key 3"),
    "whole numbers": (all_whole, r"embed_tokens\.weight is int32, quantised or no weight"),
    "mixed": (
        in_model(**{"decoder.layer_norm.bias": torch.ones(32)}),
        r"embed_tokens\.weight is float16, but decoder\.layer_norm\.bias is float32: save",
    ),
    "number": (in_model(**{MYSTERY: 3.0}), r"a\.pt: decoder\.mystery is a float, no tensor"),
    "nothing": (in_model(**{MYSTERY: None}), r"a\.pt: decoder\.mystery is a NoneType, no tensor"),
    "dict": (in_model(**{MYSTERY: {"a": torch.ones(2)}}), r"decoder\.mystery is a dict, no tensor"),
    "list": (in_model(**{MYSTERY: [torch.ones(2)]}), r"decoder\.mystery is a list, no tensor"),
}


LAYER = "decoder.layers.0"
TWICE: dict[str, tuple[str, str, str]] = {  # key, of what shape, what is said
    "positions": (
        "decoder.embed_positions_cm3.weight",
        "decoder.embed_positions.weight",
        r"embed_positions\.weight and decoder\.embed_positions_cm3\.weight both give embedding",
    ),
    "packed and apart": (
        f"{LAYER}.self_attn.qkv_proj.bias",
        f"{LAYER}.fc1.bias",
        r"self_attn\.k_proj\.bias and decoder.*qkv_proj\.bias both give layers\.0\.main\.attention",
    ),
    "00": (
        "decoder.layers.00.fc2.weight",
        f"{LAYER}.fc2.weight",
        r"decoder\.layers\.00\.fc2\.weight, which no known model has",
    ),
    "other digits": (
        "decoder.layers.\u0660.fc2.weight",
        f"{LAYER}.fc2.weight",
        r"decoder\.layers\.\u0660\.fc2\.weight, which no known model has",
    ),
    "5,000 digits": (
        f"decoder.layers.{'9' * 5000}.fc2.weight",
        f"{LAYER}.fc2.weight",
        r"decoder\.layers\.9+\.fc2\.weight, which no known model has",
    ),
}


@pytest.mark.parametrize("twice", TWICE)
def test_two_keys_of_one_weight_are_refused(twice: str, tmp_path: Path) -> None:
    key, like, message = TWICE[twice]

    def change(values: Values) -> None:
        model = values["model"]
        rows = 96 if "qkv" in key else len(model[like])
        model[key] = torch.zeros(rows, *model[like].shape[1:]).half()

    path = put(tmp_path / "a.pt", change)
    with pytest.raises(UsageError, match=message):
        read_metaseq(str(path), pico_source(tmp_path))


def test_a_conversion_that_lost_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = put(tmp_path / "a.pt", lambda v: None), Conversion._whole

    def spoil(self: Conversion, entry: Parameter) -> torch.Tensor:
        tensor = whole(self, entry).clone()
        if entry.name == "embedding.positions.weight":
            tensor[34:] = 0  # behind the certificate's prompts
        return tensor

    monkeypatch.setattr(Conversion, "_whole", spoil)
    with pytest.raises(UsageError, match=r"embedding\.positions\.weight of the result differs"):
        read_metaseq(str(path), pico_source(tmp_path)).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_is_named(odd: str, tmp_path: Path) -> None:
    change, message = ODD[odd]
    path = put(tmp_path / "a.pt", change)
    with pytest.raises(UsageError, match=message):
        read_metaseq(str(path), pico_source(tmp_path))


def add(key: str) -> Callable[[Values], Values]:
    def change(values: Values) -> Values:
        values["model"][key] = torch.ones(4).half()
        return values

    return change


def as_float(values: Values) -> Values:
    values["model"] = {key: tensor.float() for key, tensor in values["model"].items()}
    return values


def cut_packed(values: Values) -> Values:
    key = "decoder.layers.0.self_attn.qkv_proj.weight"
    values["model"][key] = values["model"][key][:-1].clone()
    return values


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ({"shards": 3}, add("decoder.extra"), "shard0.*shard2.* differ in having decoder.extra"),
        ({"parts": 2}, add("decoder.extra"), "part-0.*part-1.* differ in having decoder.extra"),
        ({"shards": 3}, as_float, r"float16 \[.*\] and float32 \[.*\]: they are not parts of one"),
        ({"parts": 2}, as_float, r"hold decoder.* as float16 \[.*\] and float32 \["),
        ({"parts": 2}, cut_packed, "are not parts of one checkpoint|no thirds"),
    ],
)
def test_a_last_file_that_is_unlike_the_others(
    form: dict[str, int], change: Any, message: str, tmp_path: Path
) -> None:
    pattern = save(tmp_path / "in", OPT, tensors_of(OPT), **form)
    alter(sorted((tmp_path / "in").iterdir())[-1], change)
    with pytest.raises(UsageError, match=message):
        read_metaseq(pattern, pico_source(tmp_path))


@pytest.mark.parametrize("form", [{}, {"parts": 2, "padded": 2}])
def test_silent_settings_keep_output_rows_of_their_own(
    form: dict[str, int], tmp_path: Path
) -> None:
    for is_tied in (False, True):
        config = dataclasses.replace(OPT, tied=is_tied, text_ids=[0, 0])
        tensors = tensors_of(config)
        pattern = save(tmp_path / f"in{is_tied}", config, tensors, **form)

        def silence(values: Values) -> Values:
            delattr(values["cfg"]["model"], "share_decoder_input_output_embed")
            return values

        for path in (tmp_path / f"in{is_tied}").iterdir():
            alter(path, silence)
        read_metaseq(pattern, pico_source(tmp_path)).write(tmp_path / "out")
        folder = WeightsFolder(tmp_path / "out")
        assert folder.config == config
        for name, value in tensors.items():
            assert torch.equal(folder.read(name), value), name


def test_settings_that_say_shared_drop_output_rows(tmp_path: Path) -> None:
    """What metaseq's scripts leave there may be a part of the rows, copied."""
    other = in_model(**{"decoder.output_projection.weight": torch.ones(161, 32).half()})
    read = read_metaseq(str(put(tmp_path / "a.pt", other)), pico_source(tmp_path))
    assert read.config.tied
    (step,) = (s for s in read.steps if s.source == "decoder.output_projection.weight")
    assert step.action == "drop: tied: the token table"


def test_another_tokenizer_is_named(tmp_path: Path) -> None:
    fewer = in_model(**{"decoder.embed_tokens.weight": torch.ones(300, 32).half()})
    with pytest.raises(UsageError, match=r"embed_tokens\.weight has 300 .* part of the checkpoint"):
        read_metaseq(str(put(tmp_path / "a.pt", fewer)), pico_source(tmp_path))


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    (tmp_path / "dir[a]").mkdir()
    for path in (tmp_path / "ck[1].pt", tmp_path / "dir[a]/x.pt"):
        path.touch()
        assert find_parts(str(path)) == [[path]]
    assert find_parts(str(tmp_path / "dir[a]")) == [[tmp_path / "dir[a]/x.pt"]]
    (tmp_path / "dir[a]/y.pt").touch()
    with pytest.raises(UsageError, match="several checkpoints") as error:
        find_parts(str(tmp_path / "dir[a]"))
    pattern = str(error.value).split("'")[1]
    assert find_parts(pattern) == [[tmp_path / "dir[a]/x.pt"]]


@pytest.mark.parametrize("code", [b"\x80\x02]r\xff\xff\xff\x7f.", b"\x80\x02]p2147483647\n."])
def test_a_memo_takes_no_more_room_than_it_is_used(code: bytes, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", code)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        assert TorchFile(tmp_path / "a.pt").values == []
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_settings_that_double_at_each_level_are_refused(tmp_path: Path) -> None:
    many: list = [1]
    for _ in range(60):
        many = [many, many]
    path = put(tmp_path / "a.pt", said("decoder_layers", many))
    with pytest.raises(UsageError, match=r"a\.pt: its settings are .*, or over a million"):
        read_metaseq(str(path), pico_source(tmp_path))


def test_metaseqs_script_leaves_metadata_of_shards_empty(tmp_path: Path) -> None:
    """reshard_fsdp.py, with whole tensors for one file."""
    path = put(tmp_path / "a.pt", lambda v: v.update(shard_metadata={}))
    due = tensors_of(OPT)
    found = read_metaseq(str(path), pico_source(tmp_path)).tensors
    assert found.keys() == due.keys()
    for name, tensor in due.items():
        assert torch.equal(found[name].read(), tensor), name


@pytest.mark.parametrize(
    "twice",
    ["decoder.embed_tokens.weight", "decoder.layers.0.fc1.weight", ""],
    ids=["in one flat vector", "in two", "beside them"],
)
def test_one_name_twice_in_a_part_is_told(twice: str, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> dict[str, Any]:
        if twice:
            (held,) = values["shard_metadata"]["param_metadata"][0]["params"].values()
            held["names"][1] = twice
        else:
            values["model"]["decoder.embed_positions.weight"] = torch.ones(1)
        return values

    source = save(tmp_path / "in", OPT, tensors_of(OPT), shards=2)
    for path in (tmp_path / "in").glob("*.pt"):
        alter(path, change)
    name = twice or "decoder.embed_positions.weight"
    with pytest.raises(UsageError, match=f"shard0.pt gives {name} twice"):
        read_metaseq(source, pico_source(tmp_path))


def test_a_shared_name_that_is_another_tensor_is_told(tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> dict[str, Any]:
        (shared,) = values["shard_metadata"]["param_metadata"][0]["shared_param_info"]
        again = (shared[0], "decoder.embed_positions.weight")
        values["shard_metadata"]["param_metadata"][0]["shared_param_info"] = [shared, shared, again]
        return values

    source = save(tmp_path / "in", OPT, tensors_of(OPT), shards=2)
    for path in (tmp_path / "in").glob("*.pt"):
        alter(path, change)
    with pytest.raises(UsageError, match=r"shard0.pt gives decoder.embed_positions.weight twice"):
        read_metaseq(source, pico_source(tmp_path))
